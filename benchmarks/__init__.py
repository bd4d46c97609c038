"""What the figures of docs/figures.md come from: each module is a program that prints a table and fails if a goal is missed."""
