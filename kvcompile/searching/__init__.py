"""Search: from a wish for bytes or quality to a recipe, and its proof on what the search never saw."""
