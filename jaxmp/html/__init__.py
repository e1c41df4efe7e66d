"""HTML for people: tables and figures of a page and of a notebook's cell, drawn by one code."""
