"""The settings of data are read as earlier versions wrote them, too."""

from moc.earlier import Earlier

DATA = Earlier("data", unset={"path": "", "local_cache": ""})
PREPARE = Earlier("prepare", unset={"fps": 0.0, "threshold": 0.0})
