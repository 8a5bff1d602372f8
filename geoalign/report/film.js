"use strict";
// The film component. Markup and data come from film.py: one <article class="film"> with a film strip for every take
// and a JSON element; everything else is made here, so that a page without scripts still shows the strips.
const geoalignFilm = (() => {
  const GAIN = 4;          // of the difference view
  const HOLD = 0.7;        // seconds that the last frame rests
  const STRIP = 9;         // frames of a strip
  const ROLES = { source: "--soft", before: "--before", after: "--after", truth: "--truth", target: "--target", base: "--c5" };
  const OTHERS = ["--c4", "--c3", "--c7", "--c5", "--c6"];

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colourName = (role, index = 0) => ROLES[role] ||
    (/^run-\d+$/.test(role) ? `--c${(Number(role.slice(4)) - 1) % 8 + 1}` : OTHERS[index % OTHERS.length]);
  const round = (value, digits = 3) => value == null || !Number.isFinite(value) ? "n/a" :
    (value === 0 ? "0" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(digits)).replace("-", "\u2212");

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  // ---- vectors: c2w is three rows of four numbers, OpenCV axes, metres ----
  const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
  const mix = (a, s, b) => [a[0] + s * b[0], a[1] + s * b[1], a[2] + s * b[2]];
  const unit = (a) => { const n = Math.hypot(...a) || 1; return a.map((v) => v / n); };
  const place = (c2w) => [c2w[0][3], c2w[1][3], c2w[2][3]];
  const axis = (c2w, column) => [c2w[0][column], c2w[1][column], c2w[2][column]];
  const usable = (c2w) => c2w && c2w.every((row) => row.every(Number.isFinite));
  const toCamera = (c2w, point) => { const d = mix(point, -1, place(c2w)); return [0, 1, 2].map((k) => dot(axis(c2w, k), d)); };
  // Horizontal axes of a world whose vertical is `down`: right is the first view's x laid flat, ahead is right x down.
  function level(down) {
    const d = unit(down), x = Math.abs(d[0]) < 0.99 ? [1, 0, 0] : [0, 0, 1];
    const right = unit(mix(x, -dot(x, d), d));
    return { right, ahead: cross(right, d), down: d };
  }
  // The nearest of 1, 2, 5 times a power of ten.
  function niceStep(wanted) {
    const power = 10 ** Math.floor(Math.log10(wanted));
    return [1, 2, 5, 10].map((f) => f * power).reduce((a, b) => Math.abs(Math.log(b / wanted)) < Math.abs(Math.log(a / wanted)) ? b : a);
  }

  // ---- pictures ----
  const WEIGHTS = new Map();
  // Catmull-Rom weights of the four neighbours, for each of the `k` places of a new pixel inside an old one.
  function phases(k) {
    if (!WEIGHTS.has(k)) {
      WEIGHTS.set(k, Array.from({ length: k }, (_, i) => {
        const at = (i + 0.5) / k - 0.5, first = Math.floor(at), t = at - first;
        const w = [(-t + 2 * t * t - t ** 3) / 2, (2 - 5 * t * t + 3 * t ** 3) / 2, (t + 4 * t * t - 3 * t ** 3) / 2, (t ** 3 - t * t) / 2];
        return { first, w };
      }));
    }
    return WEIGHTS.get(k);
  }
  // Enlarge one axis of [outer, n, inner] values by k with edges repeated.
  function enlarge(source, outer, n, inner, k) {
    const result = new Float32Array(outer * n * k * inner), table = phases(k);
    for (let o = 0; o < outer; o++) for (let j = 0; j < n * k; j++) {
      const { first, w } = table[j % k], base = Math.floor(j / k) + first - 1;
      const rows = [0, 1, 2, 3].map((m) => (o * n + Math.min(Math.max(base + m, 0), n - 1)) * inner);
      const to = (o * n * k + j) * inner;
      for (let i = 0; i < inner; i++) {
        result[to + i] = w[0] * source[rows[0] + i] + w[1] * source[rows[1] + i] + w[2] * source[rows[2] + i] + w[3] * source[rows[3] + i];
      }
    }
    return result;
  }
  function bicubic(image, k) {
    const { width, height, data } = image;
    const wide = enlarge(data, height, width, 4, k), whole = enlarge(wide, 1, height, width * k * 4, k);
    return new ImageData(Uint8ClampedArray.from(whole), width * k, height * k);  // rounds and clamps
  }
  function difference(a, b) {
    const out = new ImageData(a.width, a.height);
    let absolute = 0, square = 0;
    for (let i = 0; i < a.data.length; i++) {
      if (i % 4 === 3) { out.data[i] = 255; continue; }
      const d = Math.abs(a.data[i] - b.data[i]);
      absolute += d; square += d * d; out.data[i] = GAIN * d;
    }
    const n = a.data.length * 0.75;
    return { out, mean: absolute / n, psnr: square ? 10 * Math.log10(255 * 255 * n / square) : Infinity };
  }

  // A canvas as large as it is shown, in device pixels; returns its context scaled to CSS pixels.
  function fitted(canvas) {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return { context, width, height };
  }

  // ---- paths in space, turned by hand ----
  const VIEWS = { turned: [0.6, 0.55], above: [0, Math.PI / 2], behind: [0, 0], side: [Math.PI / 2, 0] };
  class Orbit {
    // paths: [{role, label, c2w: [F][3][4]}]; down: the vertical in axes of the first view.
    constructor(canvas, paths, down) {
      Object.assign(this, { canvas, paths, world: level(down), hidden: new Set(), frame: 0 });
      [this.yaw, this.pitch] = VIEWS.turned;
      this.measure();
      canvas.tabIndex = 0;
      canvas.addEventListener("pointerdown", (e) => { this.drag = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
      canvas.addEventListener("pointermove", (e) => this.drag && this.turn(e.clientX - this.drag[0], e.clientY - this.drag[1], e));
      for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { this.drag = null; });
      canvas.addEventListener("keydown", (e) => {
        const step = { ArrowLeft: [-14, 0], ArrowRight: [14, 0], ArrowUp: [0, -14], ArrowDown: [0, 14] }[e.key];
        if (step) { this.turn(...step); e.preventDefault(); e.stopPropagation(); }
      });
    }
    turn(dx, dy, event) {
      if (event) this.drag = [event.clientX, event.clientY];
      this.yaw -= dx * 0.01;
      this.pitch = Math.min(Math.max(this.pitch + dy * 0.01, -0.2), Math.PI / 2);
      this.onturn?.();
      this.draw(this.frame);
    }
    view(name) { [this.yaw, this.pitch] = VIEWS[name]; this.draw(this.frame); }
    flat(point) { const { right, ahead, down } = this.world; return [dot(point, right), dot(point, ahead), -dot(point, down)]; }
    measure() {
      const points = this.paths.flatMap((p) => p.c2w.filter(usable).map((c) => this.flat(place(c))));
      points.push([0, 0, 0]);
      const low = [0, 1, 2].map((k) => Math.min(...points.map((p) => p[k]))), high = [0, 1, 2].map((k) => Math.max(...points.map((p) => p[k])));
      this.low = low; this.high = high;
      this.centre = low.map((v, k) => (v + high[k]) / 2);
      this.radius = Math.max(Math.hypot(...low.map((v, k) => high[k] - v)) / 2, 0.02);
      this.step = niceStep(this.radius / 2.2);
    }
    project(flat) {
      const [r, f, u] = flat.map((v, k) => v - this.centre[k]), c = Math.cos(this.yaw), s = Math.sin(this.yaw);
      const x = r * c - f * s, depth = r * s + f * c;
      return [this.middle[0] + this.scale * x, this.middle[1] - this.scale * (u * Math.cos(this.pitch) + depth * Math.sin(this.pitch))];
    }
    draw(frame) {
      this.frame = frame;
      if (!this.canvas.clientWidth) return;
      const { context, width, height } = fitted(this.canvas);
      this.context = context;
      this.middle = [width / 2, height / 2]; this.scale = (Math.min(width, height) / 2 - 26) / (this.radius * 1.12);
      this.floor();
      for (const [index, path] of this.paths.entries()) if (!this.hidden.has(path.role)) this.path(path, index);
      this.compass(width, height);
    }
    stroke(points, colour, width, dash = []) {
      const c = this.context;
      c.beginPath(); c.strokeStyle = colour; c.lineWidth = width; c.setLineDash(dash); c.lineJoin = "round";
      points.forEach((p, i) => (i ? c.lineTo(...p) : c.moveTo(...p)));
      c.stroke(); c.setLineDash([]);
    }
    floor() {
      const s = this.step, bottom = this.bottom = this.low[2] - 0.12 * this.radius, faint = variable("--line");
      const from = [0, 1].map((k) => Math.floor(this.low[k] / s - 0.4)), to = [0, 1].map((k) => Math.ceil(this.high[k] / s + 0.4));
      for (let i = from[0]; i <= to[0]; i++) this.stroke([[i * s, from[1] * s, bottom], [i * s, to[1] * s, bottom]].map((p) => this.project(p)), faint, i ? 0.7 : 1.5);
      for (let i = from[1]; i <= to[1]; i++) this.stroke([[from[0] * s, i * s, bottom], [to[0] * s, i * s, bottom]].map((p) => this.project(p)), faint, i ? 0.7 : 1.5);
    }
    path(path, index) {
      const colour = variable(colourName(path.role, index)), c = this.context, dash = path.role === "target" ? [5, 4] : [];
      const flats = path.c2w.map((m) => (usable(m) ? this.flat(place(m)) : null));
      const run = (points, width, alpha, dashes) => {
        c.globalAlpha = alpha;
        let part = [];
        for (const p of [...points, null]) {
          if (p) { part.push(this.project(p)); continue; }
          if (part.length > 1) this.stroke(part, colour, width, dashes);
          part = [];
        }
        c.globalAlpha = 1;
      };
      run(flats.map((p) => p && [p[0], p[1], this.bottom]), 1.2, 0.25, []);
      run(flats, 1.4, 0.5, dash);
      run(flats.slice(0, this.frame + 1), 2.6, 1, dash);
      flats.forEach((p, i) => {
        if (!p || (flats.length > 20 && i !== this.frame)) return;
        c.beginPath(); c.fillStyle = colour; c.globalAlpha = i > this.frame ? 0.5 : 1;
        c.arc(...this.project(p), i === this.frame ? 4 : 2.2, 0, 7); c.fill(); c.globalAlpha = 1;
      });
      const now = flats[this.frame];
      if (now) {
        c.globalAlpha = 0.4; this.stroke([now, [now[0], now[1], this.bottom]].map((p) => this.project(p)), colour, 1, [2, 3]); c.globalAlpha = 1;
        this.frustum(path.c2w[this.frame], colour);
      }
    }
    frustum(c2w, colour) {
      const size = 0.15 * this.radius, tip = place(c2w);
      const corners = [[-1, -0.75], [1, -0.75], [1, 0.75], [-1, 0.75]].map(([x, y]) =>
        [[0, x], [1, y], [2, 1.5]].reduce((p, [k, v]) => mix(p, v * size, axis(c2w, k)), tip)).map((p) => this.project(this.flat(p)));
      const t = this.project(this.flat(tip));
      this.stroke([...corners, corners[0]], colour, 1.2);
      for (const corner of corners) this.stroke([t, corner], colour, 1.2);
    }
    compass(width, height) {
      const c = this.context, soft = variable("--soft");
      const at = [56, height - 36], names = [["right", [1, 0, 0]], ["down", [0, 1, 0]], ["view", [0, 0, 1]]];
      const origin = this.project(this.centre), length = 20 / this.scale;
      c.font = "10.5px ui-sans-serif, system-ui, sans-serif"; c.fillStyle = soft;
      for (const [name, direction] of names) {
        const tip = this.project(this.flat(direction).map((v, k) => this.centre[k] + length * v)), dx = tip[0] - origin[0], dy = tip[1] - origin[1];
        if (Math.hypot(dx, dy) < 6) continue;
        this.stroke([at, [at[0] + dx, at[1] + dy]], soft, 1.2);
        c.textAlign = dx < -3 ? "right" : "left"; c.fillText(name, at[0] + dx * 1.25, at[1] + dy * 1.25 + 3);
      }
      c.textAlign = "right"; c.fillText(`grid ${this.step} m`, width - 8, height - 9); c.textAlign = "left";
    }
  }

  // ---- one film ----
  class Player {
    constructor(root) {
      this.root = root;
      this.facts = JSON.parse(root.querySelector("script[type='application/json']").textContent);
      this.images = [...root.querySelectorAll(".film-strips img")];
      this.count = this.facts.frames.length; this.frame = this.count - 1;
      const roles = this.facts.takes.map((t) => t.role);
      this.take = Math.max(roles.indexOf("after"), 0) || Math.max(roles.findLastIndex((r) => r !== "truth"), 0);
      Object.assign(this, { selects: {}, against: -1, lines: "", smooth: this.facts.small, timer: 0 });
      Promise.all(this.images.map((image) => image.decode())).then(() => this.build());
    }
    build() {
      const { facts, root } = this;
      this.scratch = make("canvas", { width: facts.width, height: facts.height }).getContext("2d", { willReadFrequently: true });
      this.picture = make("canvas", { class: "frame", role: "img" });
      this.overlay = make("canvas", { class: "lines", "aria-hidden": "true" });
      this.badge = make("span", { class: "badge" });
      const view = make("div", { class: "film-view", style: `aspect-ratio:${facts.width}/${facts.height}` }, this.picture, this.overlay, this.badge);
      this.said = make("p", { class: "film-said" });
      const main = make("div", { class: "film-main" }, this.switches(), view, this.bar(), this.options(), this.said);
      const side = make("div", { class: "film-side" });
      if (facts.paths.length) side.append(...this.space());
      this.charts = this.numberCharts();
      side.append(...this.charts.map((chart) => chart.figure));
      root.querySelector(".film-stage").replaceChildren(main, ...(side.childElementCount ? [side] : []));
      this.strips();
      root.classList.add("live");
      root.addEventListener("keydown", (e) => this.key(e));
      new ResizeObserver(() => this.draw()).observe(view);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
      this.draw();
    }
    switches() {
      this.buttons = this.facts.takes.map((take, index) => make("button",
        { type: "button", class: "take", "data-role": take.role, style: `--hue:var(${colourName(take.role, index)})`, onclick: () => this.show({ take: index }) }, take.label));
      return make("div", { class: "film-takes", role: "group", "aria-label": "shown take" }, ...this.buttons);
    }
    bar() {
      this.playButton = make("button", { type: "button", class: "play", "aria-label": "play", onclick: () => this.toggle() });
      this.slider = make("input", { type: "range", min: 0, max: this.count - 1, step: 1, "aria-label": "frame", oninput: () => { const frame = Number(this.slider.value); this.stop(); this.show({ frame }); } });
      this.counter = make("output");
      return make("div", { class: "film-bar" }, this.playButton, this.slider, this.counter);
    }
    options() {
      const { facts } = this, choice = (name, label, entries, pick) => {
        const select = make("select", { "aria-label": label, onchange: () => pick(select.value) }, ...entries.map(([value, text]) => make("option", { value }, text)));
        this.selects[name] = select;
        return make("label", {}, `${label} `, select);
      };
      const parts = [];
      if (facts.takes.length > 1) {
        parts.push(choice("against", "Difference", [[-1, "off"], ...facts.takes.map((t, i) => [i, `to ${t.label}`])], (v) => this.show({ against: Number(v) })));
      }
      if (facts.ground && facts.paths.length) {
        const entries = [["", "off"]];
        if (this.pathOf("target")) entries.push(["asked", "as asked for"]);
        if (facts.paths.some((p) => p.role !== "target")) entries.push(["own", "of this take"]);
        parts.push(choice("lines", "Ground lines", entries, (v) => this.show({ lines: v })));
      }
      if (facts.small) parts.push(choice("smooth", "Enlarged", [["1", "bicubic"], ["", "as pixels"]], (v) => this.show({ smooth: v === "1" })));
      return make("div", { class: "film-options" }, ...parts);
    }
    space() {
      const { facts } = this;
      const canvas = make("canvas", { class: "orbit", role: "img", "aria-label": "camera paths in space; drag to turn" });
      this.orbit = new Orbit(canvas, facts.paths, facts.ground ? facts.ground.plane.slice(0, 3) : [0, 1, 0]);
      const views = Object.keys(VIEWS).map((name) => make("button", { type: "button", onclick: () => this.orbit.view(name) }, name));
      const legend = facts.paths.map((path, index) => make("button",
        { type: "button", class: "path", "aria-pressed": "true", "data-role": path.role, style: `--hue:var(${colourName(path.role, index)})`,
          onclick: (e) => this.togglePath(path.role, e.currentTarget) }, make("i"), path.label));
      return [canvas, make("div", { class: "film-views" }, ...views), make("div", { class: "film-legend" }, ...legend)];
    }
    togglePath(role, button) {
      const hide = !this.orbit.hidden.has(role);
      this.orbit.hidden[hide ? "add" : "delete"](role);
      button.setAttribute("aria-pressed", String(!hide));
      this.orbit.draw(this.frame);
    }
    numberCharts() {
      const groups = new Map();
      for (const row of this.facts.numbers) groups.set(row.title, [...(groups.get(row.title) || []), row]);
      return [...groups].map(([title, rows]) => {
        const readout = make("span", { class: "now" }), box = make("div");
        const values = rows.flatMap((r) => r.values).filter(Number.isFinite), top = Math.max(...values, 0) || 1, low = Math.min(...values, 0);
        const x = (i) => 4 + 292 * i / Math.max(this.count - 1, 1), y = (v) => 66 - 60 * (v - low) / (top - low);
        box.innerHTML = `<svg viewBox="0 0 300 72" preserveAspectRatio="none"><path class="axis" d="M4,${y(0)}H296"/>` + rows.map((r, n) => `<path d="${r.values.map((v, i) => (Number.isFinite(v) ? `${i && Number.isFinite(r.values[i - 1]) ? "L" : "M"}${x(i)},${y(v)}` : "")).join("")}" style="stroke:var(${colourName(r.role, n)})"/>`).join("") + '<path class="cursor"/></svg>';
        const svg = box.firstChild, cursor = svg.querySelector(".cursor");
        const figure = make("figure", { class: "film-number" }, make("figcaption", {}, make("b", {}, title), readout), svg);
        return { figure, draw: (frame) => {
          cursor.setAttribute("d", `M${x(frame)},2V70`);
          readout.replaceChildren(...rows.map((r, n) => make("span", { style: `color:var(${colourName(r.role, n)})` }, round(r.values[frame]))), rows[0].unit);
        } };
      });
    }
    strips() {
      const { facts } = this, shown = Array.from({ length: Math.min(STRIP, this.count) }, (_, i) => Math.round(i * (this.count - 1) / Math.max(Math.min(STRIP, this.count) - 1, 1)));
      this.root.querySelectorAll(".strip").forEach((figure, take) => {
        const gap = Math.max(Math.round(facts.width / 40), 1);
        const canvas = make("canvas", { width: shown.length * (facts.width + gap) - gap, height: facts.height });
        shown.forEach((frame, i) => this.cell(canvas.getContext("2d"), take, frame, i * (facts.width + gap), 0));
        canvas.addEventListener("click", (e) => {
          this.stop(); this.show({ take, frame: shown[Math.min(Math.floor(e.offsetX / canvas.clientWidth * shown.length), shown.length - 1)] });
        });
        this.images[take].hidden = true;
        figure.append(canvas);
      });
    }
    cell(context, take, frame, x, y) {
      const { width, height, columns } = this.facts;
      context.drawImage(this.images[take], frame % columns * width, Math.floor(frame / columns) * height, width, height, x, y, width, height);
    }
    pixels(take) {
      this.cell(this.scratch, take, this.frame, 0, 0);
      return this.scratch.getImageData(0, 0, this.facts.width, this.facts.height);
    }
    pathOf(role) { return this.facts.paths.find((p) => p.role === role); }
    show(change) { Object.assign(this, change); this.draw(); }
    toggle() { this.timer ? this.stop() : this.play(); }
    play() {
      if (this.count < 2) return;
      const step = () => {
        const last = this.frame === this.count - 2;
        this.show({ frame: (this.frame + 1) % this.count });
        this.timer = setTimeout(step, 1000 * (1 / this.facts.fps + (last ? HOLD : 0)));
      };
      this.timer = setTimeout(step, 0);
      this.draw();
    }
    stop() { clearTimeout(this.timer); this.timer = 0; this.draw(); }
    key(event) {
      const number = Number(event.key);
      if (number >= 1 && number <= this.facts.takes.length) this.show({ take: number - 1 });
      else if (event.key === " " && event.target === this.orbit?.canvas) { event.preventDefault(); this.toggle(); }
    }
    draw() {
      const { facts, root } = this, take = facts.takes[this.take], hue = `var(${colourName(take.role, this.take)})`;
      if (!this.picture) return;
      const other = this.against === this.take ? null : facts.takes[this.against];
      let image = this.pixels(this.take), said = [];
      if (other) {
        const found = difference(image, this.pixels(this.against));
        image = found.out;
        said.push(`Absolute difference of ${take.label} and ${other.label}, ${GAIN} times as bright: mean ${round(found.mean, 2)} of 255, ` +
          (Number.isFinite(found.psnr) ? `PSNR ${found.psnr.toFixed(1)} dB` : "equal") + (facts.small ? "." : ", of compressed pictures."));
      } else if (this.against === this.take) said.push(`Difference: ${take.label} is the take it is taken to; switch to another.`);
      this.paint(image, said);
      this.drawLines(take, said);
      root.style.setProperty("--shown", hue);
      this.badge.textContent = other ? `${take.label} \u2212 ${other.label}` : take.label;
      this.picture.setAttribute("aria-label", `${this.badge.textContent}, frame ${facts.frames[this.frame]}`);
      this.buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === this.take)));
      this.slider.value = this.frame;
      for (const [name, select] of Object.entries(this.selects)) select.value = name === "smooth" ? (this.smooth ? "1" : "") : this[name];
      this.counter.textContent = `${facts.frames[this.frame]} / ${facts.frames[this.count - 1]}`;
      this.playButton.classList.toggle("on", this.timer !== 0);
      this.playButton.setAttribute("aria-label", this.timer ? "pause" : "play");
      this.said.textContent = said.join(" ");
      this.orbit?.draw(this.frame);
      for (const chart of this.charts) chart.draw(this.frame);
    }
    paint(image, said) {
      const { facts } = this, [width, height] = facts.given, size = `${width} \u00d7 ${height} pixels`;
      const shown = this.picture.clientWidth / facts.width, k = this.smooth ? Math.min(Math.max(Math.ceil(shown * (window.devicePixelRatio || 1)), 2), 12) : 1;
      const whole = this.smooth ? bicubic(image, k) : image;
      this.picture.width = whole.width; this.picture.height = whole.height;
      this.picture.style.imageRendering = this.smooth ? "auto" : "";
      this.picture.getContext("2d").putImageData(whole, 0, 0);
      if (this.smooth) said.push(`Frames of ${size}, enlarged ${k} times by a bicubic filter (Catmull-Rom).`);
      else if (facts.small) said.push(`Frames of ${size}, each pixel shown as a square (nearest neighbour), ${shown.toFixed(1)} times enlarged.`);
      else said.push(`Frames of ${size}` + (width > facts.width ? `, stored ${facts.width} wide (Lanczos)` : "") + "; scaled to the screen by the browser.");
      if (facts.given[2] > this.count) said.push(`${this.count} of ${facts.given[2]} frames.`);
    }
    drawLines(take, said) {
      const { context, width, height } = fitted(this.overlay);
      if (!this.lines) return;
      const role = this.lines === "asked" || take.role === "truth" ? "target" : take.role, path = this.pathOf(role), c2w = path?.c2w[this.frame];
      if (!usable(c2w)) { said.push("Ground lines: no camera is known for this take."); return; }
      const { plane, lens } = this.facts.ground, [fx, fy, cx, cy] = lens[this.frame], n = plane.slice(0, 3), step = niceStep(plane[3] / lens[0][0] / 5), reach = 24;
      const world = level(n), foot = n.map((v) => v * plane[3]), near = 0.02 * Math.abs(plane[3]);
      const point = (a, b) => mix(mix(foot, a * step, world.right), b * step, world.ahead);
      const segment = (p, q, alpha, bold) => {
        let a = toCamera(c2w, p), b = toCamera(c2w, q);
        if (a[2] < near && b[2] < near) return;
        if (a[2] < near) a = mix(a, (near - a[2]) / (b[2] - a[2]), mix(b, -1, a));
        if (b[2] < near) b = mix(b, (near - b[2]) / (a[2] - b[2]), mix(a, -1, b));
        const [from, to] = [a, b].map((v) => [width * (fx * v[0] / v[2] + cx), height * (fy * v[1] / v[2] + cy)]);
        for (const [colour, thick] of [["rgba(0,0,0,", 3], ["rgba(255,255,255,", 1.3]]) {
          context.beginPath(); context.strokeStyle = `${colour}${alpha * (thick > 2 ? 0.35 : 0.9)})`; context.lineWidth = thick + (bold ? 1 : 0);
          context.moveTo(...from); context.lineTo(...to); context.stroke();
        }
      };
      for (let i = -reach; i <= reach; i++) for (let j = -reach; j < reach; j++) {
        const alpha = 1 - Math.hypot(i, j + 0.5) / reach;
        if (alpha <= 0) continue;
        segment(point(i, j), point(i, j + 1), alpha, i === 0); segment(point(j, i), point(j + 1, i), alpha, i === 0);
      }
      said.push(`Lines on the ground every ${step} m, as ${role === "target" ? "the path asked for" : `the camera of ${take.label}`} would see them: a picture filmed along it keeps to its lines.`);
    }
  }

  document.querySelectorAll("article.film").forEach((root) => { root.player = new Player(root); });
  return { Orbit, Player, make, round, level, niceStep, colourName, variable, usable, place, axis, dot, cross, mix, unit, toCamera };
})();
