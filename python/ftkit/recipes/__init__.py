"""Recipes: sample, score, select, train, repeat; one file a recipe."""
