"""Recipes (`*.yaml`) that `nas run` finds by name, and the scripts that fitted what ships."""
