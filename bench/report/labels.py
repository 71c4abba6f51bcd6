"""Names beside the points of a picture, none over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels

_FONT_SIZE = 10.8
_CLEAR = 7.0  # of a point, in pixels of 1 / 72 inch
# Where a name may stand: pixels to the right and upwards, and which of its own corners or sides is put there.
_BESIDE = ((9, 0, "left", "center"), (-9, 0, "right", "center"), (7, 7, "left", "bottom"), (7, -7, "left", "top"),
           (-7, 7, "right", "bottom"), (-7, -7, "right", "top"))  # fmt: skip
_ABOVE = tuple((x, y, "center", "bottom") for y in (9, 24, 39, 54, 69) for x in (0, -25, 25))
_BELOW = tuple((x, -y, "center", "top") for x, y, _, _ in _ABOVE)


def label_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], order: Sequence[str], *, line_color: str
) -> None:
    """Write each point's name where it covers least, with a line to its point where that is far.

    Args:
        axes: with their final limits, in a figure of 72 dots an inch.
        points: name -> x and y.
        order: the names; the first ones choose first.
        line_color: of the lines.
    """
    picture = axes.get_figure(root=True)
    assert picture is not None
    picture.draw_without_rendering()
    frame = axes.get_window_extent()
    dots = {name: tuple(axes.transData.transform(point)) for name, point in points.items()}
    taken = [(x - _CLEAR, y - _CLEAR, x + _CLEAR, y + _CLEAR) for x, y in dots.values()]
    for name in order:
        text = axes.annotate(name, points[name], fontsize=_FONT_SIZE)
        extent = text.get_window_extent()
        text.remove()

        def cost(place: tuple[float, float, str, str], name: str = name, extent: Box = extent.bounds) -> float:
            box = _box(dots[name], place, extent[2], extent[3])
            outside = max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1 - _CLEAR)
            outside += max(0, frame.y0 - box[1]) + max(0, box[3] - frame.y1)
            covered = sum(_overlap(box, other) for other in taken)
            return 20 * outside + covered + 0.3 * (abs(place[0]) + abs(place[1]))

        best = min((*_BESIDE, *_ABOVE, *_BELOW), key=cost)
        taken.append(_box(dots[name], best, extent.width, extent.height))
        x, y, ha, va = best
        line = {"arrowstyle": "-", "color": line_color, "linewidth": 0.8, "shrinkB": _CLEAR - 2, "shrinkA": 1}
        axes.annotate(name, points[name], xytext=(x, y), textcoords="offset points", ha=ha, va=va,
                      fontsize=_FONT_SIZE, arrowprops=line if abs(y) > 10 else None)  # fmt: skip


def _box(dot: tuple[float, ...], place: tuple[float, float, str, str], width: float, height: float) -> Box:
    x, y = dot[0] + place[0], dot[1] + place[1]
    left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[place[2]] * width
    bottom = y - {"bottom": 0.0, "center": 0.5, "top": 1.0}[place[3]] * height
    return left, bottom, left + width, bottom + height


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
