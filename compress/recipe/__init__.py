"""The recipe: the YAML file that fixes a whole run. Reading its outline (`load`) needs neither torch nor any method."""
