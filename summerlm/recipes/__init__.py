"""Recipes: the front page. Each flow of the system, put together on one screen."""
