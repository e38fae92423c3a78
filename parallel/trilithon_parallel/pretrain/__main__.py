"""One rank: `torchrun --nproc-per-node 4 -m trilithon_parallel.pretrain config.yaml`."""

import sys
from pathlib import Path

from trilithon_parallel.launch.ending import end_process
from trilithon_parallel.pretrain.run import EXIT_USAGE, main

if len(sys.argv) != 2:
    print("usage: python -m trilithon_parallel.pretrain CONFIG.yaml", file=sys.stderr)
    sys.exit(EXIT_USAGE)
end_process(main(Path(sys.argv[1])))
