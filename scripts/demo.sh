#!/usr/bin/env bash
# Set-up and the whole story on a CPU: pictures are drawn, a tiny policy is trained and aligned, a report page is written.
set -euo pipefail
source "$(dirname "$0")/setup.sh" demo
exec .venv/bin/vapr demo "$@"
