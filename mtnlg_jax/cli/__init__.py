"""The commands: each module holds the flags and the ``main`` of one script of launch/ and of one
console command."""
