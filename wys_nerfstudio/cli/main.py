"""Entry point of the `wys` console script: ends without traceback after Ctrl-C and when its output is closed."""

# Only modules that load at once: Ctrl-C during any other import is handled below.
import os
import signal
import sys

INTERRUPTED = 130
"""Exit code of a program that was ended by Ctrl-C."""


def entrypoint() -> None:
    """Run the `wys` command."""
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if Ctrl-C is ignored, as under nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            from wys_nerfstudio.utils.log_filters import ignore_warnings

            ignore_warnings()  # the commands' imports warn, too
            from wys_nerfstudio.cli.commands import run

            run()
        finally:
            if signal.getsignal(signal.SIGINT) is interrupt:  # at exit, Python prints a traceback if it is interrupted
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            sys.stdout.flush()  # and if the output is closed
    except BrokenPipeError as error:  # as in `wys compare RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        # An interrupted import can raise anything.
        if not (stopped or interrupted):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        print(f"wys: {(stopped and str(error)) or 'Stopped.'}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


if __name__ == "__main__":
    entrypoint()
