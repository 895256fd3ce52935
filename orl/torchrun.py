"""`python -m orl.torchrun`: torchrun, but a process that failed has said why, so no stack trace of torchrun's own."""

import logging
import signal
import sys


def main() -> None:
    """Run torchrun; exits with the status of the process that failed first."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # torchrun's own report of how its processes ended
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status < 0:
            name = signal.Signals(-status).name
            print(f"orl: process {rank} of the training was killed ({name}); memory may be short", file=sys.stderr)
            status = 128 - status
        sys.exit(status)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
