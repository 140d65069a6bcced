"""What a head group can become. Importing this package registers every target."""
