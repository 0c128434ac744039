"""The `wys` command, one module per subcommand."""
