"""All tasks. A new one is a file and a line here: importing a task registers it."""

import compress.data.continuation
import compress.data.facts
import compress.data.key_value
import compress.data.passkey
import compress.data.passkeys  # noqa: F401
