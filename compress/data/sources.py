"""All sources of text. A new one is a file and a line here: importing a source registers it."""

import compress.data.generated
import compress.data.text  # noqa: F401
