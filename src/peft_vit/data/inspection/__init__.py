"""What a folder of images holds, as it is looked at once: sides, copies, what can be read, and what is for the test."""
