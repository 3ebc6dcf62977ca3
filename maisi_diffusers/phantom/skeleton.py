"""Bones: spine, ribs, sternum, shoulder girdle, pelvis, femora, skull."""

import numpy as np

from .canvas import Canvas, Solid, difference, profile, union
from .frame import SPINE, arm_axis, cage_radius, spine_y

SIDES = {"right": 1, "left": -1}
DISC = 7.0  # mm of every level of the loins, less where vertebrae are flatter
COSTAL_ANGLE = [152, 150, 148, 145, 143, 141, 138, 128, 116, 104, 72, 52]  # degrees from the spine to a rib's end
RIB_DROP = [32, 44, 56, 66, 76, 84, 90, 92, 92, 90, 66, 44]  # mm that it has come down there


def vertebra_levels() -> list[tuple[str, float, float]]:
    """(name, bottom, top) of the vertebrae L5 to C1, in mm; between them are the discs."""
    names = [f"vertebrae L{i}" for i in range(5, 0, -1)]
    names += [f"vertebrae T{i}" for i in range(12, 0, -1)] + [f"vertebrae C{i}" for i in range(7, 0, -1)]
    pitches = [36.0] * 5 + list(np.linspace(28, 21, 12)) + [17.0] * 7
    bottoms = 5 + np.concatenate([[0], np.cumsum(pitches)[:-1]])
    return [(name, b, b + p * (1 - DISC / 36)) for name, b, p in zip(names, bottoms, pitches)]


LEVELS = vertebra_levels()
TOP = {name: top for name, _, top in LEVELS}


def draw_skeleton(canvas: Canvas) -> None:
    """Paint all bones and the spinal cord on the body."""
    draw_spine(canvas)
    draw_rib_cage(canvas)
    draw_shoulders(canvas)
    draw_pelvis(canvas)
    draw_skull(canvas)


def draw_spine(canvas: Canvas) -> None:
    """Vertebrae one by one, sacrum and spinal cord, as bands of height of three columns."""
    window = canvas.window((-52, -150, -125), (52, 30, 605))
    x, y, z = (c[window] for c in (canvas.x, canvas.y, canvas.z))
    if not y.size:
        return
    y = y - profile(z, SPINE)
    half_width = profile(z, [(-110, 10), (-30, 40), (0, 26), (100, 23), (200, 18), (400, 14), (480, 12), (600, 13)])
    half_depth = profile(z, [(-110, 7), (-30, 13), (0, 18), (100, 17), (200, 15), (400, 12), (480, 9), (600, 9)])
    canal = profile(z, [(-110, 3), (0, 9), (200, 9), (480, 9), (600, 11)])
    behind = half_depth + canal + 2  # from the middle of the body to that of the canal
    cord_distance = np.hypot(x, y + behind)
    body = (np.abs(x) / half_width) ** 3 + (np.abs(y) / half_depth) ** 3 < 1
    arch = (cord_distance < canal + 6) & (cord_distance >= canal)
    canvas.paint("spinal cord", Solid.of(window, (cord_distance < canal - 1) & (z > -60)))

    canvas.fill("disc", window, body & (z > 0) & (z < TOP["vertebrae C2"]))

    sacrum = (body | arch | ((np.abs(x) < half_width) & (y > -behind - 6) & (y < half_depth * 0.6))) & (z < 0)
    canvas.paint("vertebrae S1", Solid.of(window, sacrum & (z > -30)))
    canvas.paint("sacrum", Solid.of(window, sacrum))

    # Transverse and spinous processes hang from the arch; the loins' are longest across, the chest's slope down.
    for i, (name, bottom, top) in enumerate(LEVELS):
        height = top - bottom
        part = canvas.window((-52, -150, bottom - 22), (52, 30, top + 4))
        local = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, window))
        zs, xs, ys = z[local], x[local], y[local]
        here = (zs > bottom) & (zs < top)
        bone = here & body[local]
        bone |= (zs > bottom + 0.25 * height) & (zs < top + 2) & arch[local]
        lumbar, thoracic = i < 5, 5 <= i < 17
        slope = 0.15 if lumbar else 0.75 if thoracic else 0.35
        reach = 44 if lumbar else 34 if thoracic else 14
        centre = bottom + 0.5 * height + slope * (ys + behind[local] + 8)
        bone |= (
            (np.abs(xs) < 3.5)
            & (np.abs(zs - centre) < 0.28 * height)
            & (ys < -behind[local] - 4)
            & (ys > -behind[local] - canal[local] - reach * 0.72)
        )
        across = 40 if lumbar else 30 if thoracic else 20
        bone |= (
            (np.abs(xs) < across)
            & (np.abs(zs - bottom - 0.6 * height) < 4.5)
            & (np.abs(ys + behind[local] + 0.12 * np.abs(xs)) < 5)
            & (cord_distance[local] >= canal[local])
        )
        painted = canvas.paint(name, Solid.of(part, bone))
        canvas.content[part][painted] = 0  # no disc


def draw_rib_cage(canvas: Canvas) -> None:
    """Ribs, their cartilages and the sternum."""
    sternum = [(0, _front(z) - 6, z) for z in (430, 410, 388, 350, 310, 288, 272)]
    canvas.paint("sternum", canvas.tube(sternum, [19, 21, 15, 15, 17, 12, 5], flat=0.42))
    for number in range(1, 13):
        start = TOP[f"vertebrae T{number}"]
        for word, side in SIDES.items():
            points = _rib(number, side, start)
            radius = 5.2 if number not in (1, 11, 12) else 4.4
            canvas.paint(f"{word} rib {number}", canvas.tube(points, radius))
            if number <= 10:
                x, y, z = points[-1]
                if number <= 7:
                    height = 424 - (number - 1) * 23.0
                    end = (side * 14, _front(height) - 6, height)
                else:
                    end = _rib(number - 1, side, TOP[f"vertebrae T{number - 1}"])[-1]
                    end = (end[0] - side * 8, end[1] + 3, end[2] + 4)
                middle = ((x + end[0]) / 2, max(y, end[1]) + 1, min(z, end[2]) + 0.25 * abs(z - end[2]))
                canvas.paint("costal cartilages", canvas.tube([(x, y, z), middle, end], 5.4))


def _front(z: float) -> float:
    """Y of the outer side of the rib cage in front, in mm."""
    _, depth, middle = cage_radius(z)
    return float(middle + depth)


def _rib(number: int, side: int, start: float) -> list[tuple[float, float, float]]:
    """Points of a rib from the spine to its cartilage."""
    end, drop = COSTAL_ANGLE[number - 1], RIB_DROP[number - 1]
    points = [(side * 14, spine_y(start) - 12, start), (side * 28, spine_y(start) - 22, start)]
    for angle in np.radians(np.linspace(26, end, 9)):
        share = float(angle / np.radians(end))
        z = start + 4 - drop * share**1.3
        width, depth, middle = cage_radius(z)
        # The superellipse of the cage, 4 mm below its outer side.
        s, c = np.sin(angle), -np.cos(angle)
        radius = (np.abs(s / (width - 4)) ** 2.2 + np.abs(c / (depth - 4)) ** 2.2) ** (-1 / 2.2)
        points.append((side * radius * s, middle + radius * c, z))
    return points


def draw_shoulders(canvas: Canvas) -> None:
    """Clavicles, scapulae, humeri."""
    for word, side in SIDES.items():
        clavicle = [(side * 20, 42, 428), (side * 62, 46, 444), (side * 100, 18, 456), (side * 136, -14, 458)]
        canvas.paint(f"{word} clavicula", canvas.tube(clavicle, [8, 6, 6, 7]))
        axis = arm_axis(side, canvas.subject.arms)
        head = canvas.ellipsoid((axis[0][0], axis[0][1], axis[0][2] + 4), (23, 23, 23))
        shaft = canvas.tube(axis, [13, 12, 11, 11][: len(axis)])
        canvas.paint(f"{word} humerus", union(head, shaft))
        blade = canvas.ellipsoid((side * 98, -76, 385), (40, 4.5, 66), tilt=(8, -side * 8, side * 24), power=2.6)
        spine = canvas.tube([(side * 62, -92, 412), (side * 118, -78, 440), (side * 146, -42, 462)], [5, 6, 8])
        glenoid = canvas.tube([(side * 112, -62, 420), (side * 126, -38, 428)], [9, 11])
        canvas.paint(f"{word} scapula", union(blade, spine, glenoid))


def iliac_crest(side: float) -> list[tuple[float, float, float]]:
    """The upper edge of a hip bone's wing, from the sacrum to the front; `side` is 1 on the right, -1 on the left."""
    return [
        (side * 48, -82, 6),
        (side * 84, -68, 48),
        (side * 120, -24, 62),
        (side * 130, 22, 36),
        (side * 118, 44, 2),
    ]


def iliac_base(side: float) -> list[tuple[float, float, float]]:
    """Where the wing ends below, from the sacrum over the socket to the front."""
    return [(side * 46, -68, -16), (side * 66, -46, -44), (side * 92, -12, -64), (side * 98, 26, -68)]


def draw_pelvis(canvas: Canvas) -> None:
    """Hips and femora."""
    wide = 1.06 if canvas.subject.sex == "female" else 1.0
    for word, side in SIDES.items():
        s = side * wide
        head = (s * 89, 4, -96)
        femur = union(
            canvas.ellipsoid(head, (23, 23, 23)),
            canvas.tube([head, (s * 122, -8, -112)], [16, 17]),
            canvas.tube(
                [(s * 128, -14, -104), (s * 124, -10, -132), (s * 118, 0, -200), (s * 104, 8, -420)],
                [15, 19, 14.5, 14],
            ),
        )
        canvas.paint(f"{word} femur", femur)
        wing = canvas.fan(iliac_crest(s), iliac_base(s), 6.0)
        crest = canvas.tube(iliac_crest(s), 8)
        column = canvas.tube(iliac_base(s), [13, 14, 15, 12])
        socket = canvas.ellipsoid(head, (33, 33, 33))
        opening = (canvas.x[socket.window] * side > abs(s) * 89 + 12) | (canvas.z[socket.window] < -112)
        socket = socket.without(opening)
        pubis = canvas.tube(
            [(s * 74, 24, -92), (s * 42, 48, -104), (s * 13, 58, -122), (s * 12, 54, -140)], [11, 8, 10, 9]
        )
        ischium = canvas.tube(
            [(s * 78, -22, -104), (s * 66, -34, -140), (s * 52, -22, -164), (s * 30, 14, -156), (s * 13, 44, -142)],
            [15, 16, 13, 8, 8],
        )
        canvas.paint(f"{word} hip", union(wing, crest, column, socket, pubis, ischium))


def draw_skull(canvas: Canvas) -> None:
    """Skull with jaws and nasal cavities, and the brain in it."""
    inner = canvas.ellipsoid((0, 8, 666), (64, 82, 66))
    if not inner.level.size:
        return
    stem = canvas.tube([(0, -22, 606), (0, -8, 640)], [9, 20])
    canvas.paint("brain", union(inner, stem, blend=0.2))
    for side in SIDES.values():
        horn = canvas.tube(
            [(side * 8, 46, 674), (side * 13, 10, 684), (side * 17, -26, 678), (side * 28, -12, 656)], [5, 6, 7, 4]
        )
        canvas.fill("cerebrospinal fluid", horn.window, horn.inside)
    outer = canvas.ellipsoid((0, 8, 665), (70, 89, 73))
    outer = outer.without(canvas.z[outer.window] < 606)
    base = canvas.ellipsoid((0, 18, 610), (50, 42, 12), power=2.6)
    face = canvas.ellipsoid((0, 72, 606), (42, 24, 34), power=2.6)
    hollow = [canvas.ellipsoid((0, 72, 600), (9, 20, 24))]
    for side in SIDES.values():
        hollow.append(canvas.ellipsoid((side * 26, 74, 606), (13, 14, 18)))
        hollow.append(canvas.ellipsoid((side * 32, 86, 640), (17, 20, 17)))
    for cavity in hollow:  # sinuses and nose are full of air
        canvas.fill("gas", cavity.window, cavity.inside)
    face = difference(face, *hollow)
    jaw = canvas.tube(
        [(50, 10, 604), (46, 22, 562), (30, 70, 552), (0, 86, 550), (-30, 70, 552), (-46, 22, 562), (-50, 10, 604)], 8
    )
    canvas.paint("skull", union(outer, base, face, jaw))
