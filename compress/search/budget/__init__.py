"""What a plan may cost: the kinds of budget, one file each, and the recipe's budget, which is made of all of them."""
