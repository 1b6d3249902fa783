"""What every section of a report says, in sentences and rows of figures: the page, the Markdown and the terminal render it."""
