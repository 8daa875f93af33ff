"""The board: rows of any number of folders as one table, one page and one picture."""
