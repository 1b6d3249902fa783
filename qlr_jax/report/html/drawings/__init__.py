"""The drawings of the pages: inline SVG, or files of their own."""
