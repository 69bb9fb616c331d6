"""Beyond the lesson: scripts that build on the five, which do not know them."""

import support  # before torch: it sets how threads wait
