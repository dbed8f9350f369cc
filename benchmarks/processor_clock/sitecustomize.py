"""A clock of seconds that the processor worked for a call, its processes together: minutes on a machine that is shared.

`PYTHONPATH=benchmarks/processor_clock python ...` makes it `time.monotonic` and `time.perf_counter`, on Linux.
"""

import os
import resource
import time

_largest = [0.0]


def _processor_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                seconds += sum(time.clock_gettime((~int(child) << 3) | 2) for child in file.read().split())
        except OSError:  # the thread or the child has ended
            continue
    _largest[0] = max(_largest[0], seconds)  # what has ended counts in full, what runs as far as it is told
    return _largest[0]


time.monotonic = time.perf_counter = _processor_seconds
