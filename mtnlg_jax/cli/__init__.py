"""The commands. Each module holds the flags and the ``main`` of a script of launch/ and of the
console command of the same name."""
