"""The panel in nerfstudio's viewer and the commands that it issues."""
