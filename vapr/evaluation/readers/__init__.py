"""Files that other evaluation harnesses write, read as questions and predictions."""
