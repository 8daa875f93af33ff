"""What a step reads of the tokens that are kept: groups of entries, and the choice among them."""
