"""What a plan may cost: the budget of a recipe, and the kinds of cost that it can limit."""
