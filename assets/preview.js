// Client of the Preview tab: the form, base against LoRA, the image in progress.
//
// The form is drawn and filled here, so that no response replaces a control that is in use. The server's state of it
// comes with a revision; each change made here gets the next one.
(() => {
  const { one, all, get, post, make, t, refocus } = window.easel;
  // Least, middle and most of a strength.
  const USUAL = [0, 1, 1.5], SLIDER = [-2, 0, 2];
  const root = document.documentElement;
  let rows = [], apart = false, groups = [], best = {}, sliders = [], rev = -1, project = null, mark = "", sending = false, changedAt = 0;
  const form = (id = "preview-form") => document.getElementById(id);
  const fieldsOf = () => Object.fromEntries([...new FormData(form())].map(([name, value]) => [name, String(value)]));
  const stripOf = () => { const { values, on } = form("strip-form").elements; return { values: values.value, on: on.checked }; };
  const rowsOf = () => rows.map(({ file, strength, text }) => ({ file, strength, text: apart ? text ?? strength : null }));
  const sent = () => ({ rows: rowsOf(), apart, fields: fieldsOf(), strip: stripOf() });

  // ---- the LoRAs ------------------------------------------------------------------------------------------------
  // A row of the form, filled in: the file, and a strength with marks at 0, at 1 and at the measured best.
  const rowOf = (row, index) => {
    const made = one("#lora-row").content.firstElementChild.cloneNode(true), own = (selector) => one(selector, made), number = index + 1;
    const label = (node, text) => node.setAttribute("aria-label", text);
    made.dataset.row = index;
    label(made, `LoRA ${number}`);
    const select = own("select"), path = own("[data-part=path]"), away = own("[data-remove-lora]");
    select.prepend(...groups.map(([heading, found]) => make("optgroup", { label: heading }, ...found.map(([title, file]) => make("option", { value: file, textContent: title })))));
    select.value = row.file;
    if (select.selectedIndex < 0) select.value = "";
    select.title = path.value = row.file;
    path.hidden = select.value !== "";
    label(path, t("Path of LoRA {number}", { number }));
    away.dataset.removeLora = index;
    label(away, t("Remove LoRA {number}", { number }));
    const marks = sliders.includes(row.file) ? SLIDER : USUAL, [least, , largest] = marks;
    const at = (value) => `${(100 * (value - least)) / (largest - least)}%`;
    const most = best[row.file], star = own(".best"), set = own("[data-set-best]");
    star.hidden = set.hidden = !(most > 0 && most <= largest);
    star.style.left = at(most);
    set.textContent = t("Set to best, {strength}", { strength: most });
    set.dataset.setBest = index;
    for (const dial of all(".dial", made)) {
      const { part } = dial.dataset, words = part === "text" ? t("Text encoder") : apart ? "UNet" : t("Strength"), name = rows.length > 1 ? t("{part} of LoRA {number}", { part: words, number }) : words;
      one("span", dial).textContent = words;
      all(".ticks [data-mark]", dial).forEach((tick, place) => { tick.textContent = marks[place]; tick.style.left = at(marks[place]); });
      Object.assign(one("input[type=range]", dial), { min: least, max: largest });
      for (const input of all("input", dial)) {
        input.value = row[part] ?? row.strength;
        label(input, input.type === "number" ? `${name}${t(", typed")}` : name);
      }
    }
    if (!apart) own("[data-part=text]").remove();
    if (!index) [own(".lora-head").id, own(".dial").id] = ["preview-lora", "strength"];
    return made;
  };

  const show = () => {
    const place = one("#loras");
    const add = make("button", { type: "button", className: "own quiet", id: "add-lora", textContent: rows.length ? t("Add another LoRA") : t("Add a LoRA") });
    const box = make("input", { type: "checkbox", checked: apart, id: "text-apart" });
    const note = rows.length ? [] : [make("p", { className: "small", textContent: t("Without a LoRA only the base generates.") })];
    const more = rows.length ? [make("label", { className: "tick small" }, box, t("Separate text encoder strength"))] : [];
    refocus(place, () => place.replaceChildren(...rows.map(rowOf), ...note, make("div", { className: "row apart" }, add, ...more)));
    place.dataset.ready = "1";
  };

  // A folded group shows its values.
  const summarize = () => {
    const { sampler, steps, cfg, width, height, negative, image } = form().elements;
    const size = width.value && height.value ? `, ${width.value} × ${height.value}` : "";
    const from = image.value ? t(", from an image") : "";
    const words = { negative: negative.value.slice(0, 40) || t("none"), sampling: t("{sampler}, {steps} steps, guidance {cfg}", { sampler: sampler.selectedOptions[0]?.textContent, steps: steps.value, cfg: cfg.value }) + size + from };
    for (const place of all("[data-summary]")) if (place.textContent !== words[place.dataset.summary]) place.textContent = words[place.dataset.summary];
  };
  const fill = (fields, strip) => {
    for (const [name, value] of Object.entries({ ...fields })) {
      const field = form().elements[name];
      if (field && field !== document.activeElement) field.value = value ?? "";
    }
    const { values, on } = form("strip-form").elements;
    if (values !== document.activeElement) values.value = strip.values;
    on.checked = strip.on;
    summarize();
  };

  // One request at a time, in order, each with all that has changed: `later` says that something did while one was in
  // flight, `moved` that a strength did.
  let later = false, moved = false, timer = null;
  const proceed = () => {
    const next = later;
    later = false;
    if (next) send();
    return next;
  };
  const keep = (answer) => {
    if (answer.rev !== undefined) rev = Math.max(rev, answer.rev);
    sending = false;
    changedAt = Date.now();
    return answer;
  };
  const send = async () => {
    if (sending) { later = true; return; }
    const body = { ...sent(), moved };
    hold();
    sending = true;
    // What does not arrive is sent again by Generate.
    keep(await post("preview/rows", body));
    if (!proceed()) read();
  };
  const hold = () => { clearTimeout(timer); timer = null; later = moved = false; };
  // An answer with the form outranks edits before the click.
  const take = (data) => {
    if (!data) return;
    hold();
    ({ rows, apart, rev, project, groups, best, sliders } = data);
    fill(data.fields, data.strip);
    show();
  };
  const changed = (strength, wait) => { followSeed(); moved ||= strength; clearTimeout(timer); timer = setTimeout(() => { timer = null; send(); }, wait); };

  const read = () => {
    const place = one("#preview-base-note");
    if (!place || !one("#loras") || !form("strip-form") || sending || timer || (place.dataset.mark === mark && one("#loras").dataset.ready)) return;
    let data;
    try { data = JSON.parse(place.dataset.form); } catch { return; }
    // A longer list of files, or a form that follows the newest run, can wait while the user is editing.
    const held = document.activeElement?.matches("#loras select, #loras input");
    const reset = data.rev === 0 && rev > 0 && Date.now() - changedAt > 3000;
    const followed = data.rev === 0 && rev <= 0 && JSON.stringify([data.rows, data.apart]) !== JSON.stringify([rows, apart]);
    const listed = JSON.stringify([data.groups, data.best, data.sliders]) !== JSON.stringify([groups, best, sliders]);
    const fresh = data.project !== project || data.rev > rev || reset || !one("#loras").dataset.ready;
    mark = fresh || !held ? place.dataset.mark : "";
    if (fresh || (followed && !held)) ({ rows, apart, rev, project } = data);
    if (fresh || (data.rev === 0 && rev <= 0 && !form().contains(document.activeElement))) fill(data.fields, data.strip);
    if (fresh || ((followed || listed) && !held)) { ({ groups, best, sliders } = data); show(); }
  };

  document.addEventListener("input", (event) => {
    const target = event.target;
    if (target.id === "text-apart") { apart = target.checked; show(); changed(true, 0); one("#text-apart").focus(); return; }
    const index = target.closest?.("#loras [data-row]")?.dataset.row, part = target.dataset?.part;
    if (index === undefined || !part) {
      if (target.classList?.contains("split")) split(target.value);
      else if (target.closest?.("#preview-form, #strip-form")) { summarize(); changed(false, 400); }
      return;
    }
    const row = rows[index];
    if (part === "file" || part === "path") {
      row.file = target.value;
      if (part === "file") {
        const path = one("[data-part=path]", target.closest("[data-row]"));
        path.hidden = target.value !== "";
        path.value = target.value;
        if (!path.hidden) path.focus();
      }
      changed(false, part === "path" ? 400 : 0);
      return;
    }
    const value = Number(target.value);
    if (target.value === "" || !Number.isFinite(value)) return;
    row[part] = value;
    for (const twin of all(`[data-part=${part}]`, target.closest(".dial"))) if (twin !== target) twin.value = value;
    if (one("#preview-result")) working();
    changed(true, 60);
  });

  // ---- the image in progress ----------------------------------------------------------------------------------------
  const split = (value) => root.style.setProperty("--split", `${value}%`);
  const working = () => {
    const state = one("#preview-state"), cancel = one("#cancel-drawing");
    if (!state) return;
    Object.assign(state.dataset, { state: "working", busy: "1" });
    state.className = "small num";
    state.textContent = t("Generating");
    if (cancel) { cancel.disabled = false; cancel.title = ""; }
  };

  const refuse = (words) => {
    const state = one("#preview-state");
    Object.assign(state.dataset, { state: "error", busy: "0" });
    state.className = "problem num";
    state.textContent = words;
    one("#cancel-drawing").disabled = true;
  };

  window.easel.on("preview", ({ words, look }) => {
    const state = one("#preview-state"), image = one("#compare img.look");
    if (words && state?.dataset.state === "working") state.textContent = words;
    if (!image) return;
    image.hidden = !look;
    if (look && state?.offsetParent) image.src = `/easel/preview/look?n=${look}`;
  });

  // Changes arrive before the next request: the server may finish two requests in the other order, and
  // an older form would count as the newer one.
  const idle = async () => { while (sending) await window.easel.later(20); };
  const generate = async (what) => {
    hold();
    const note = one("#grid-note");
    if (what === "grid") note.textContent = ""; else working();
    if (what === "image" && root.dataset.compare === "grid") showStage();
    await idle();
    sending = true;
    const answer = keep(await post("preview/generate", { ...sent(), what, grid: gridOf() }));
    if (what === "grid") note.textContent = answer.problem ?? "";
    else if (answer.problem && !answer.away) refuse(answer.problem);
    // Changes made meanwhile.
    proceed();
  };
  document.addEventListener("submit", (event) => {
    const what = { "preview-form": "image", "strip-form": "strip", "grid-form": "grid" }[event.target.id];
    if (!what) return;
    event.preventDefault();
    generate(what);
  });

  // ---- the axes of the grid: files to tick, prompts by line, numbers by comma ---------------------------------------
  const axes = () => all("#grid-form [data-axis]");
  const valuesOf = (axis) => {
    const text = one(":is(input[type=text], textarea)", axis);
    if (!text) return all("input:checked", axis).map((box) => box.value);
    return text.value.split(text.tagName === "TEXTAREA" ? "\n" : "\u0000").map((value) => value.trim()).filter(Boolean);
  };
  const gridOf = () => (form("grid-form")?.dataset.ready ? Object.fromEntries(axes().map((axis) => [axis.dataset.axis, { kind: one("select", axis).value, values: valuesOf(axis) }])) : null);
  const showAxis = (axis, { kind, html }) => {
    one("select", axis).value = kind;
    one("[id$=-values]", axis).innerHTML = html;
  };
  // The seeds of a grid begin with the form's, until other ones are typed.
  let firstSeed = null;
  const seedsFrom = (seed) => [0, 1, 2].map((number) => Math.max(0, Number(seed)) + number).join(", ");
  const followSeed = () => {
    const now = form().elements.seed.value;
    for (const axis of axes()) {
      const text = one("select", axis).value === "seed" && one("input[type=text]", axis);
      if (text && text.value === seedsFrom(firstSeed)) text.value = seedsFrom(now);
    }
    firstSeed = now;
  };
  const loadAxes = async () => {
    firstSeed = form().elements.seed.value;
    const found = await get("preview/axes");
    for (const axis of axes()) showAxis(axis, found[axis.dataset.axis]);
    form("grid-form").dataset.ready = "1";
  };
  document.addEventListener("change", async ({ target }) => {
    const axis = target.closest?.("#grid-form [data-axis]");
    if (axis && target.name === "kind") showAxis(axis, await get(`preview/axes?side=${axis.dataset.axis}&kind=${target.value}`));
    else if (target.id === "preview-file" && target.files.length) { await openFile(target.files[0]); target.value = ""; }
  });

  // ---- files: a LoRA is added, an image's settings are shown --------------------------------------------------------
  let infotext = "";
  const report = (reply) => {
    one("#preview-report").replaceChildren(reply.problem ? make("p", { className: "problem", textContent: reply.problem, attributes: { role: "alert" } }) : make("div", { innerHTML: reply.html }));
  };
  const openFile = async (file) => {
    if (timer) { hold(); await send(); }
    await idle();
    const answer = await window.easel.upload("preview/file", file);
    infotext = answer.text ?? "";
    take(answer.form);
    report(answer);
  };

  // Puts the settings of an image, as its file holds them, into the form.
  window.easel.useSettings = async (text) => {
    hold();
    await idle();
    const answer = await post("preview/infotext", { text });
    take(answer.form);
    report(answer);
  };

  // ---- opening the tab: once the strip of the run that was just trained, else a first image if requested ------------
  let wasOpen = false, wanted = false;
  const opened = async () => {
    try {
      loadAxes();
      const answer = await post("preview/open", {});
      if (!answer.fill && !answer.drawn && wanted) first();
    } catch { /* As above. */ } finally { wanted = false; }
  };
  const first = (tries = 40) => {
    const ready = one("#loras")?.dataset.ready && one("#prompt textarea").value;
    if (!ready && tries) setTimeout(() => first(tries - 1), 100);
    else if (!one("#preview-base")) generate("image");
  };

  // ---- the mask -------------------------------------------------------------------------------------------------
  // Over the image that the form starts from, or over its mask: an inpainting base paints the white area.
  const paintMask = async () => {
    const { image, mask } = form().elements, shown = await post("preview/mask", { image: image.value, mask: mask.value });
    if (shown.problem) { window.easel.toast(shown.problem, "bad"); return; }
    const address = (data) => data && `data:image/webp;base64,${data}`, inner = document.importNode(one("#mask-dialog").content, true), picture = one("img", inner);
    picture.src = address(shown.shown);
    await picture.decode();
    const sides = [picture.naturalWidth, picture.naturalHeight], box = window.easel.dialog(t("Mask"), inner);
    one(".frame", box).style.aspectRatio = sides.join(" / ");
    const close = await window.easel.paintMask(box, sides, address(shown.painted), async (png, how) => {
      const answer = png ? await post("preview/mask", { image: image.value, png }) : { mask: "" };
      if (answer.problem) { window.easel.toast(answer.problem, "bad"); return; }
      if (how !== "cancel") { mask.value = answer.mask; summarize(); changed(false, 0); }
      box.close();
    });
    if (box.open) box.addEventListener("close", close); else close();
  };

  document.addEventListener("click", async (event) => {
    const target = event.target.closest("button, a");
    if (!target) return;
    const data = target.dataset;
    const setSeed = (value) => { form().elements.seed.value = value; changed(false, 0); };
    if (target.id === "paint-mask") await paintMask();
    else if (target.id === "cancel-drawing") post("preview/cancel", {});
    else if (target.id === "dice") setSeed(-1);
    else if (target.id === "last-seed") { const { seed } = one("#preview-state").dataset; if (seed) setSeed(seed); }
    else if (target.id === "add-lora") {
      rows.push({ file: groups[0]?.[1]?.[0]?.[1] ?? "", strength: 1, text: null });
      show();
      changed(false, 0);
      one(`#loras [data-row="${rows.length - 1}"] select`)?.focus();
    } else if (data.removeLora !== undefined) { rows.splice(Number(data.removeLora), 1); show(); changed(false, 0); one("#add-lora").focus(); }
    else if (data.setBest !== undefined) { const row = rows[data.setBest]; row.strength = best[row.file]; show(); if (one("#preview-result")) working(); changed(true, 0); }
    else if (data.putBack !== undefined) {
      hold();
      await idle();
      const answer = await post("preview/put-back", { file: data.putBack });
      if (answer.problem) window.easel.toast(answer.problem, "bad");
      take(answer.form);
      showStage();
    } else if (data.forget !== undefined) {
      const answer = await post("preview/forget", { file: data.forget });
      if (answer.problem) window.easel.toast(answer.problem, "bad");
      else window.easel.toast(t("Image moved to the trash."), "", () => post("preview/bring-back", answer));
    }
    else if (data.startFrom) {
      const answer = await post("preview/start", { file: data.startFrom });
      report(answer);
      // A mask is of the image before.
      if (answer.image) { form().elements.image.value = answer.image; form().elements.mask.value = ""; summarize(); changed(false, 0); }
    }
    else if (target.id === "send-to-form") window.easel.useSettings(infotext);
    else if (data.compare) setMode(data.compare);
    else if (data.showPreview !== undefined) wanted = true;
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !one("#generate")?.offsetParent) return;
    event.preventDefault();
    generate("image");
  });
  // The detail shows where the pointer is.
  document.addEventListener("pointermove", ({ target, clientX, clientY }) => {
    const stage = target.closest?.("#compare"), detail = one(".stage .detail > div");
    if (!stage || !detail) return;
    const box = stage.getBoundingClientRect();
    detail.style.backgroundPosition = `${(100 * (clientX - box.left)) / box.width}% ${(100 * (clientY - box.top)) / box.height}%`;
  });

  const setMode = (mode) => { root.dataset.compare = mode; localStorage.setItem("easel-compare", mode); modes(); };
  // An image that was asked for is to be seen.
  const showStage = () => { if (["strip", "grid"].includes(root.dataset.compare)) setMode("slider"); };
  const modes = () => { for (const button of all("button[data-compare]")) button.setAttribute("aria-pressed", button.dataset.compare === root.dataset.compare); };
  root.dataset.compare = localStorage.getItem("easel-compare") || "slider";
  window.easel.settling.push(() => {
    if (!form()) return;
    read();
    modes();
    const slider = one("input.split"), place = parseFloat(root.style.getPropertyValue("--split"));
    if (slider && !Number.isNaN(place) && document.activeElement !== slider) slider.value = place;
    const open = Boolean(one("#generate")?.offsetParent);
    if (open && !wasOpen) opened();
    wasOpen = open;
  });
})();
