"""The index: one SQLite database on a local disk. `engine` runs functions in it, `migrate` keeps its schema current."""
