// Client of the Preview tab: the form, base against LoRA, the image in progress.
//
// The form is filled here, so that no response replaces a control that is in use. The server's state of it comes with a
// revision; each change made here gets the next one.
(() => {
  const { one, all, get, post, request, make, t, fill } = window.easel;
  const root = document.documentElement, ROWS = "preview/rows";
  let rev = -1, project = null, mark = "", sending = false, changedAt = 0;
  const form = (id = "preview-form") => document.getElementById(id);
  const fieldsOf = () => Object.fromEntries([...new FormData(form())].map(([name, value]) => [name, String(value)]));
  const stripOf = () => { const { values, on } = form("strip-form").elements; return { values: values.value, on: on.checked }; };
  // Text encoder strengths by file, for when they are separate again.
  const texts = new Map();
  const apart = () => Boolean(one("#text-apart")?.checked);
  const rowsOf = () => all("#loras [data-row]").map((row) => {
    // A number that is being typed may be none yet.
    const number = (part) => one(`[data-part=${part}][data-typed]`, row)?.value || one(`input[data-part=${part}]`, row)?.value;
    const file = one("select", row).value || one("[data-part=path]", row).value, strength = Number(number("strength"));
    return { file, strength, text: apart() ? Number(number("text") ?? texts.get(file) ?? strength) : null };
  });
  const sent = () => ({ rows: rowsOf(), apart: apart(), fields: fieldsOf(), strip: stripOf() });

  // The LoRAs, as the server renders them, and the list of files in each row.
  const show = (html) => {
    const rows = make("div", { innerHTML: html }), files = one("template", rows);
    files.remove();
    for (const list of all("select", rows)) {
      list.append(files.content.cloneNode(true));
      const options = [...list.options];
      (options.find(({ value }) => value === list.title) ?? options.at(-1)).setAttribute("selected", "");
    }
    fill(one("#loras"), ...rows.childNodes);
    one("#text-apart").checked = one("#text-apart").defaultChecked;
    one("#loras").dataset.ready = "1";
  };

  // A folded group shows its values.
  const summarize = () => {
    const { sampler, steps, cfg, width, height, negative, image } = form().elements;
    const size = width.value && height.value ? `, ${width.value} × ${height.value}` : "";
    const from = image.value ? t(", from an image") : "";
    const words = { negative: negative.value.slice(0, 40) || t("none"), sampling: t("{sampler}, {steps} steps, guidance {cfg}", { sampler: sampler.selectedOptions[0]?.textContent, steps: steps.value, cfg: cfg.value }) + size + from };
    for (const place of all("[data-summary]")) if (place.textContent !== words[place.dataset.summary]) place.textContent = words[place.dataset.summary];
  };
  const fillFields = (fields, strip) => {
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
  const send = async (options = {}) => {
    if (sending && !options.keepalive) { later = true; return; }
    const body = { ...sent(), moved };
    hold();
    sending = true;
    keep(await post("preview/rows", body, { ...options, keep: ROWS }));
    if (!proceed()) read();
  };
  addEventListener("pagehide", () => { if (timer || later) send({ keepalive: true }); }, true);
  // A newer form outranks one that has not arrived.
  const hold = () => { clearTimeout(timer); timer = null; later = moved = false; window.easel.forget(ROWS); };
  // LoRAs that come and go are rendered by the server; `edit` waits for the answer before, which would revert it.
  const redraw = async (edit, more = {}) => {
    const strength = moved;
    hold();
    await idle();
    edit();
    sending = true;
    const { html } = keep(await post("preview/loras", { ...sent(), moved: strength, ...more }));
    if (html !== undefined && (!later || more.add)) show(html);
    if (!proceed()) read();
  };
  const separate = (box, on) => redraw(() => {
    box.checked = true;
    if (!on) for (const { file, strength, text } of rowsOf()) texts.set(file, text === strength ? undefined : text);
    box.checked = on;
  }, { moved: true });
  // An answer with the form outranks edits before the click.
  const take = (data) => {
    if (!data) return;
    hold();
    ({ rev, project } = data);
    fillFields(data.fields, data.strip);
    show(data.loras);
  };
  const changed = (strength, wait) => { followSeed(); moved ||= strength; clearTimeout(timer); timer = setTimeout(() => { timer = null; send(); }, wait); };

  const read = () => {
    const place = one("#preview-base-note");
    if (!place || !one("#loras") || !form("strip-form") || sending || timer || (place.dataset.mark === mark && one("#loras").dataset.ready)) return;
    let data;
    try { data = JSON.parse(place.dataset.form); } catch { return; }
    // A longer list of files, or a form that follows the newest run, can wait while the user is editing.
    const held = document.activeElement?.matches("#loras [data-row] :is(select, input)"), { ready } = one("#loras").dataset;
    const reset = data.rev === 0 && rev > 0 && Date.now() - changedAt > 3000, follows = data.rev === 0 && rev <= 0;
    const fresh = data.project !== project || data.rev > rev || reset || !ready;
    mark = fresh || !held ? place.dataset.mark : "";
    if (fresh || (follows && !form().contains(document.activeElement))) fillFields(data.fields, data.strip);
    if (fresh || (!held && (follows || data.rev === rev))) show(data.loras);
    if (fresh) ({ rev, project } = data);
  };

  document.addEventListener("input", (event) => {
    const target = event.target;
    if (target.id === "text-apart") return separate(target, target.checked);
    const row = target.closest?.("#loras [data-row]"), part = target.dataset?.part;
    if (!row || !part) {
      if (target.classList?.contains("split")) split(target.value);
      else if (target.closest?.("#preview-form, #strip-form")) { summarize(); changed(false, 400); }
      return;
    }
    if (part === "path") return changed(false, 400);
    if (part === "file") {
      const path = one("[data-part=path]", row);
      path.value = target.title = target.value;
      path.hidden = target.value !== "";
      if (!path.hidden) path.focus();
      return changed(false, 0);
    }
    const value = Number(target.value);
    if (target.value === "" || !Number.isFinite(value)) return;
    for (const twin of all(`[data-part=${part}]`, target.closest(".dial"))) if (twin !== target) twin.value = value;
    if (one("#preview-result")) working();
    changed(true, 60);
  });

  // ---- the image in progress ----------------------------------------------------------------------------------------
  const split = (value) => {
    root.style.setProperty("--split", `${value}%`);
    root.dataset.shows = { 0: "lora", 100: "base" }[value] ?? "both";
  };
  // All of the base, then all of the LoRA.
  const flip = () => {
    const slider = one("input.split");
    slider.value = slider.value === "100" ? 0 : 100;
    split(slider.value);
  };
  const tell = (state, words) => {
    const place = one("#preview-state"), cancel = one("#cancel-drawing"), busy = state === "working";
    if (!place) return;
    Object.assign(place.dataset, { state, busy: Number(busy) });
    place.className = busy ? "small num" : "problem num";
    place.textContent = words;
    Object.assign(cancel, { disabled: !busy, title: busy ? "" : t("Nothing is being generated.") });
  };
  const working = () => tell("working", t("Generating")), refuse = (words) => tell("error", words);

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
    else if (answer.problem) refuse(answer.problem);
    // Changes made meanwhile.
    proceed();
  };
  document.addEventListener("submit", (event) => {
    const what = { "preview-form": "image", "strip-form": "strip", "grid-form": "grid" }[event.target.id];
    if (what) generate(what);
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
    // Without an answer, the axes are asked for when the tab opens again.
    loadAxes().catch(() => {});
    const answer = await post("preview/open", {});
    if (!answer.fill && !answer.drawn && wanted) first();
    wanted = false;
  };
  const first = (tries = 40) => {
    const ready = one("#loras")?.dataset.ready && one("#prompt textarea").value;
    if (!ready && tries) setTimeout(() => first(tries - 1), 100);
    else if (!one("#preview-base")) generate("image");
  };

  // ---- the mask -------------------------------------------------------------------------------------------------
  // Over the image that the form starts from, or over its mask: an inpainting base paints the white area.
  const paintMask = async () => {
    const { image, mask } = form().elements, shown = await request("preview/mask", { image: image.value, mask: mask.value });
    if (!shown) return;
    const address = (data) => data && `data:image/webp;base64,${data}`, inner = document.importNode(one("#mask-dialog").content, true), picture = one("img", inner);
    picture.src = address(shown.shown);
    await picture.decode();
    const sides = [picture.naturalWidth, picture.naturalHeight], box = window.easel.dialog(t("Mask"), inner);
    one(".frame", box).style.aspectRatio = sides.join(" / ");
    const close = await window.easel.paintMask(box, sides, address(shown.painted), async (png, how) => {
      const answer = png ? await request("preview/mask", { image: image.value, png }) : { mask: "" };
      if (!answer) return;
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
    else if (target.id === "flip") flip();
    else if (target.id === "dice") setSeed(-1);
    else if (target.id === "last-seed") { const { seed } = one("#preview-state").dataset; if (seed) setSeed(seed); }
    else if (target.id === "add-lora") { await redraw(() => {}, { add: true }); all("#loras [data-row] select").at(-1)?.focus(); }
    else if (data.removeLora !== undefined) { one("#add-lora").focus(); await redraw(() => target.closest("[data-row]").remove()); }
    else if (data.setBest !== undefined) {
      for (const input of all("input", target.closest(".dial"))) input.value = data.setBest;
      if (one("#preview-result")) working();
      changed(true, 0);
    }
    else if (data.putBack !== undefined) {
      hold();
      await idle();
      take((await request("preview/put-back", { file: data.putBack }))?.form);
      showStage();
    } else if (data.star) request("preview/star", { file: data.star, on: Boolean(data.on) });
    else if (data.forget !== undefined) {
      const answer = await request("preview/forget", { file: data.forget });
      if (answer) window.easel.toast(t("Image moved to the trash."), "", () => post("preview/bring-back", answer));
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
    if (event.key === " " && event.target.classList.contains("split")) { event.preventDefault(); flip(); }
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
