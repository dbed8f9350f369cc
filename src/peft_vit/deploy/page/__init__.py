"""The page of a model, and the parts that every page is made of; without torch."""
