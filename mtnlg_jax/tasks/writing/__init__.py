"""Write a text longer than the context: outline, sections, rolling memory, ranked pieces."""
