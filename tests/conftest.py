"""Here so that pytest puts this directory on the path: tests say `from builders import …`."""

from hypothesis import HealthCheck, settings

# How long an example takes is nothing that a test is to depend on.
settings.register_profile(
    "untimed", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")
