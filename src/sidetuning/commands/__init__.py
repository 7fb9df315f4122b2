"""The commands of the library, one file each; a command is a dataclass `Settings` and a function `main(settings)`."""
