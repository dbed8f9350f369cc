"""Labels in: which image to label next, and a page to click through."""
