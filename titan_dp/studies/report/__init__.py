"""`titan-dp report`: from run folders to tables, fits, figures and one page; command.py is where it begins."""
