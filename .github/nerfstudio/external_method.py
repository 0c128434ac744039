"""Draft of this method's entry in nerfstudio/configs/external_methods.py, where `ExternalMethod` is defined."""

external_methods.append(  # noqa: F821
    ExternalMethod(  # noqa: F821
        """[bold yellow]Watch Your Steps[/bold yellow]
For more information visit: https://docs.nerf.studio/nerfology/methods/wys.html

To enable Watch Your Steps, you must install it first by running:
  [grey]pip install wys-nerfstudio[/grey]""",
        configurations=[
            ("wys", "Watch Your Steps: edit a scene by text, only where the text is about."),
            ("wys-small", "Watch Your Steps for small GPUs: the same field and edits, fewer rays at once."),
            ("wys-tiny", "Watch Your Steps, tiny: toy-sized scenes and the embedded demo editor."),
        ],
        pip_package="wys-nerfstudio",
    )
)
