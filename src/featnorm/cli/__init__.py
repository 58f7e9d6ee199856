"""The command line: one module per command, and what they share.

A command is a function of the command's name, in a module of that name. Its signature declares its options, and
its docstring is its help text. Options that several commands share are types in `featnorm.cli.options`. A line in
`featnorm.__main__` adds the command.

``featnorm --help`` and shell completion import the modules of all commands. At its top such a module therefore
imports only what is imported quickly; torch, and whatever imports torch, is imported in its functions.
"""
