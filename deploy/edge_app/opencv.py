"""OpenCV, which reads videos and writes pictures for the app: imported only where it is needed, and quiet."""

from __future__ import annotations

import os
from typing import Any

from runtime.errors import OptionError


def opencv(option: str) -> Any:
    """Return the module cv2, which says nothing on standard error: our errors are one line.

    Args:
        option: of the command line, which needs it.

    Raises:
        OptionError: OpenCV is not installed, or cannot be imported.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's name for silence; read at the first opening
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read while it is imported
    try:
        import cv2
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        raise OptionError(f"{option} needs OpenCV; pip install 'clearpact[camera]'") from None
    except ImportError as error:  # a distribution's, which was built against another numpy
        said = " ".join(str(error).split())
        raise OptionError(
            f"{option}: OpenCV is installed and cannot be imported ({said}); a distribution's may need "
            "pip install 'numpy<2'"
        ) from None
    return cv2
