"""What a head group can become, one file each."""
