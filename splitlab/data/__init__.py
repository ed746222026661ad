"""Data sets and where they come from: layouts, pictures, captions, annotators, generators."""
