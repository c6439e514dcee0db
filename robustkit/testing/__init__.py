"""For test suites: assert that a model is robust, and check your own attacks, threats, goals and defences.

`assert_robust` needs only torch; the checks generate cases with hypothesis: pip install 'robustkit[testing]'.
"""

from robustkit.testing.assertion import assert_robust
from robustkit.testing.attack_laws import check_attack
from robustkit.testing.defence_laws import check_defence
from robustkit.testing.goal_laws import check_goal
from robustkit.testing.hyperplane import Hyperplane
from robustkit.testing.threat_laws import check_threat

__all__ = ["Hyperplane", "assert_robust", "check_attack", "check_defence", "check_goal", "check_threat"]
