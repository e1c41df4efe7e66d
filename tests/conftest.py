from __future__ import annotations

import hypothesis

# Compiling takes longer than hypothesis' deadline, and a rule that holds today should be tested with the same examples
# tomorrow. (Tests on several devices start a process of their own: eight devices would slow down all others.)
hypothesis.settings.register_profile("jaxmp", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxmp")
