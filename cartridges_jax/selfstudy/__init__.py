"""Self-study: a teacher converses about a corpus, and the conversations are stored (paper section 4.1)."""

from cartridges_jax.selfstudy.local_teacher import LocalTeacher
from cartridges_jax.selfstudy.teacher import TEACHERS, Reply, Teacher, make_teacher, register

__all__ = ["TEACHERS", "LocalTeacher", "Reply", "Teacher", "make_teacher", "register"]
