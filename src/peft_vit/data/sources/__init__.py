"""Where images come from: folders and archives, Hugging Face data sets, packages, arrays in memory."""
