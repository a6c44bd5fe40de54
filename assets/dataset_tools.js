// The Dataset tab's tools: import, bulk edit of captions, checks.
(() => {
  const easel = window.easel;
  const { one, all, get, post, make, plural, t } = easel;

  // ---- import: file by file, so that errors name the file and folders stay folders -----
  const AT_ONCE = 4, PARCEL_BYTES = 8e6, PARCEL_FILES = 200, MOST_FILES = 100_000;
  let sending = null;

  const note = (text, bad = false) => {
    const place = one("#import-note > p");
    if (!place) return;
    Object.assign(place, { className: bad ? "problem" : "small", textContent: text });
    place.nextElementSibling.hidden = true;
  };

  const progress = (words, share, stop) => {
    const place = one("#import-note > .importing");
    if (!place) return;
    note("");
    place.hidden = false;
    one(".track", place).setAttribute("aria-valuenow", Math.round(100 * share));
    one("i", place).style.width = `${100 * share}%`;
    one("span", place).textContent = words;
    one("#import-stop").hidden = !stop;
  };

  // Small files share a request: one request per caption would take longer than the images.
  const parcels = (files) => {
    const made = [];
    let room = 0;
    files.forEach(({ file, path }, index) => {
      if (!made.length || room < file.size || made.at(-1).length >= PARCEL_FILES) { made.push([]); room = PARCEL_BYTES; }
      room -= file.size;
      made.at(-1).push({ index, file, name: path.toWellFormed?.() ?? path });
    });
    return made;
  };

  const send = (url, parcel, seen) => new Promise((resolve, reject) => {
    const list = JSON.stringify(parcel.map(({ index, name, file }) => [index, name, file.size]));
    const body = new Blob([list, "\n", ...parcel.map(({ file }) => file)]);
    const request = new XMLHttpRequest();
    request.open("PUT", url);
    request.upload.onprogress = (event) => seen(event.loaded);
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* reported below */ }
      if (answer.received) { seen(body.size); resolve(); } else reject(new Error(answer.problem || t("The window did not take the file.")));
    };
    request.onerror = async () => {
      for (const { file, name } of parcel) await file.slice(0, 1).arrayBuffer().catch(() => reject(new Error(t("{name} cannot be read; nothing was added.", { name }))));
      reject(new Error(t("The window does not answer; nothing was added.")));
    };
    request.send(body);
  });

  // `files`: [{ file, path }], the path including dropped folders.
  const take = async (files) => {
    easel.openTab("Dataset");
    if (sending) return note(t("Another import is running; wait until it is done."), true);
    if (!files.length) return note(t("There is nothing in that folder."), true);
    if (files.length > MOST_FILES) return note(t("More than 100,000 files cannot be taken at once; drop fewer."), true);
    sending = { stopped: false };
    const own = easel.project, mine = sending, wanted = parcels(files), loaded = new Array(wanted.length).fill(0), total = Math.max(1, files.reduce((sum, { file }) => sum + file.size, 0));
    let next = 0, done = 0, batch = null;
    try {
      const begun = await post("upload", {});
      if (begun.problem) throw new Error(begun.problem);
      batch = begun.batch;
      const worker = async () => {
        while (next < wanted.length && !mine.stopped) {
          const index = next++;
          const show = () => progress(t("Reading {done} of {files}", { done: done.toLocaleString("en"), files: plural(files.length, "file") }), 0.5 * Math.min(1, loaded.reduce((a, b) => a + b, 0) / total), true);
          await send(`/easel/upload/${batch}`, wanted[index], (bytes) => { loaded[index] = bytes; show(); });
          done += wanted[index].length;
          show();
        }
      };
      await Promise.all(Array.from({ length: AT_ONCE }, worker));
      if (mine.stopped) throw new Error(t("The import was cancelled; nothing was added."));
      const answer = await startImport(`upload/${batch}`, {});
      if (answer.problem) throw new Error(answer.problem);
      batch = null;
      await finished(answer, 0.5, own);
    } catch (error) {
      mine.stopped = true;
      if (batch) post(`upload/${batch}`, { give_up: true });
      note(error.message, true);
    } finally { sending = null; }
  };

  // An import into the demo opens the project of the user's own images; this page goes along.
  const startImport = async (path, body) => {
    easel.joining = true;
    try {
      const answer = await post(path, body);
      easel.project = answer.project ?? easel.project;
      return answer;
    } finally { easel.joining = false; }
  };

  // The import that is shown: begun here, or by another page. `done` is called when it has ended.
  let followed = null;
  const finished = ({ number }, from, own) => new Promise((done) => { followed = { number, from, own, done }; easel.tell("import"); });
  easel.on("import", (state) => {
    if (!one("#import-note")) return false;
    const { number } = state;
    if (state.state === "working" && (followed?.number ?? 0) < number && !sending) followed = { number, from: 0, own: easel.project, done: () => {} };
    // Numbers only grow: the server was restarted since, or another page began the next import.
    if (followed && number > followed.number) {
      const { done } = followed, lost = state.state === "idle";
      followed = null;
      easel.load().then(() => {
        note(lost ? t("LoRA Easel was restarted before the import was done; import the same again, images already here are skipped.") : "", lost);
        done();
        easel.tell("import");
      });
      return;
    }
    // A status of an earlier import is older than the one begun here.
    if (followed?.number !== number) return;
    if (state.state !== "working") {
      const { own, done } = followed;
      followed = null;
      easel.load().then(() => {
        // Only if the import changed the form: text being typed must not be lost.
        if (state.left_demo || easel.project !== own) easel.refill();
        note(state.note ?? "", state.state === "failed");
        post("check", { by_itself: true }).then(watchCheck);
        done();
      });
      return;
    }
    const share = state.total ? state.done / state.total : 0;
    // Reading the images takes most of the time, moving them the rest.
    const part = { "Looking": 0, "Checking": share * 0.85, "Importing": 0.85 + share * 0.15, "Reading captions": 1 }[state.phase] ?? 0;
    progress(state.total ? t("{phase}, {done} of {total}", { phase: t(state.phase), done: state.done.toLocaleString("en"), total: state.total.toLocaleString("en") }) : t(state.phase), followed.from + (1 - followed.from) * part, state.phase !== "Reading captions");
  });

  const fromPath = async () => {
    const field = one("#dataset-path input"), path = field.value;
    if (sending) return;
    const own = easel.project;
    sending = {};
    try {
      const answer = await startImport("import", { path, link: one("#dataset-link").checked });
      if (answer.problem) return note(answer.problem, true);
      await finished(answer, 0, own);
      field.value = "";
    } catch (error) { note(error.message, true); } finally { sending = null; }
  };
  easel.takeFiles = take;
  addEventListener("beforeunload", (event) => { if (sending && "stopped" in sending) event.preventDefault(); });

  // ---- bulk edit ------------------------------------------------------------------------------------
  const edit = () => ({
    do: one("#bulk-do").value, find: one(one("#bulk-do").value === "table" ? "#bulk-table" : "#bulk-find").value, put: one("#bulk-put").value,
    regex: one("#bulk-regex").checked, any_case: one("#bulk-case").checked,
  });
  // The options of a captioner or of a mask model: values by the names of its fields.
  const VALUES = { checkbox: "checked", number: "valueAsNumber" }, ANNOTATORS = { caption: "captioner", mask: "masker" };
  const fieldsOf = (what) => all(`[data-${ANNOTATORS[what]}]`).map((input) => [input.dataset[ANNOTATORS[what]], input]);
  const asked = (what) => Object.fromEntries(fieldsOf(what).map(([name, input]) => [name, input[VALUES[input.type] ?? "value"]]));
  const scoped = (body) => { const names = easel.scope(); return names ? { ...body, pictures: names } : body; };
  const bulkSay = (text, bad = false) => one("#bulk-preview").replaceChildren(make("p", { className: bad ? "problem" : "small", textContent: text }));

  // Separate from the preview, which is rebuilt as soon as captions change.
  const outcome = (text, bad = false) => {
    one("#bulk-note").className = bad ? "problem" : "small";
    one("#bulk-note").textContent = text;
  };

  const allow = (on, why) => {
    const button = one("#bulk-apply");
    button.disabled = !on;
    button.title = on ? "" : why;
  };

  // What a model made last counts as long as the form asks for the same.
  const made = { caption: {}, mask: {} };
  const annotated = (what) => made[what].state === "done" && made[what].fresh && Object.entries(asked(what)).every(([key, value]) => made[what].asked[key] === value);
  easel.annotator = (what) => scoped(asked(what));
  easel.showAnnotator = (what, state) => {
    const first = !made[what].asked, of = ({ state, fresh, asked, found }) => JSON.stringify([state, fresh, asked, found]);
    const before = of(made[what]);
    made[what] = state;
    if (first) for (const [name, input] of fieldsOf(what)) {
      const kept = state.asked[name];
      if (kept !== undefined) input[VALUES[input.type] === "checked" ? "checked" : "value"] = kept;
    }
    if (before !== of(state) && one("#bulk")?.open && one("#bulk-do").value === what) soon();
  };

  let lookup = 0;
  const preview = async () => {
    const form = one("#bulk-form"), number = ++lookup;
    if (!form) return;
    const kind = one("#bulk-do").value, masks = kind === "mask", replace = kind === "replace";
    all("[data-for]", form).forEach((node) => { node.hidden = !node.dataset.for.split(" ").includes(kind); });
    one("#bulk-put-title").textContent = replace ? t("Replace with") : t("Text");
    one("#bulk-apply").textContent = masks ? t("Write masks") : t("Change captions");
    const scope = easel.scope(), whom = scope ? plural(scope.length, "image") : t("all images");
    if (kind in ANNOTATORS && !annotated(kind)) {
      allow(false, t("Press Preview first"));
      return bulkSay(t("For {images}. Press Preview to see what the model says of them.", { images: whom }));
    }
    if (!(kind in ANNOTATORS) && !edit()[replace || kind === "table" ? "find" : "put"]) {
      allow(false, t("Type the text to find or add first"));
      return bulkSay(t("For {images}. Type to see what would change.", { images: whom }));
    }
    const answer = await post("bulk", scoped(edit()));
    if (number !== lookup) return;
    allow(!answer.problem && answer.changed > 0, answer.problem ?? (masks ? t("No mask would be written") : t("No caption would change")));
    if (answer.problem) bulkSay(answer.problem, true); else easel.fillParts(answer);
  };

  const change = async (body, tell = outcome, again = false) => {
    allow(false, t("The captions are being changed"));
    await easel.waitingSaves();
    const answer = await post("bulk", { ...body, apply: true });
    if (answer.problem) { soon(); tell(answer.problem, true); return false; }
    await easel.load();
    await tags();
    // An applied edit is not offered again.
    if ("regex" in body) for (const name of ["#bulk-find", "#bulk-put"]) one(name).value = "";
    preview();
    const changed = body.do === "mask" ? t("{masks} written.", { masks: plural(answer.changed, "mask") }) : t("{captions} changed.", { captions: plural(answer.changed, "caption") });
    const words = answer.changed ? changed : body.do === "mask" ? t("No mask had to be written.") : t("No caption had to be changed.");
    tell(words);
    if (answer.changed && !again) easel.did(words, undo, () => change(body, outcome, true));
    return true;
  };

  const undo = async () => {
    allow(false, t("The captions are being changed"));
    await easel.waitingSaves();
    const answer = await post("bulk/undo", {});
    if (answer.problem) { soon(); outcome(answer.problem, true); return false; }
    await easel.load();
    await tags();
    const word = answer.masks ? "mask" : "caption";
    const kept = answer.kept ? ` ${t("{captions} changed since then and left as they are.", { captions: plural(answer.kept, word) })}` : "";
    outcome(`${t("{captions} restored.", { captions: plural(answer.undone, word) })}${kept}`);
    preview();
    return true;
  };
  // Pressed twice, it undoes one step.
  let undoing = false;
  const undoLast = () => {
    if (undoing) return;
    undoing = true;
    easel.inTurn(undo).then((done) => { if (done) easel.undone(undo); }).finally(() => { undoing = false; });
  };

  // Pressed twice is done once, though its turn may come later.
  const apply = (...given) => { allow(false, t("The captions are being changed")); return easel.inTurn(() => change(...given)); };
  const addTrigger = () => apply({ do: "trigger", put: one("#trigger :is(input, textarea)").value }, note);

  // One of the edits, for the selected images or for those of a filter.
  const openBulk = ({ bulk, only }) => {
    if (only) easel.chooseFilter(only);
    one("#bulk").open = true;
    one("#bulk-do").value = bulk;
    preview();
    one(`[data-for~=${bulk}] input`).focus();
    one("#bulk").scrollIntoView({ block: "nearest" });
  };

  const tags = async () => {
    if (!one("#bulk")?.open) return;
    const { html, undo } = await get("tags"), button = one("#bulk-undo");
    button.hidden = !undo;
    button.title = undo ? t("Takes back: {what}", { what: undo }) : "";
    easel.fill(one("#bulk-tags"), html);
  };

  const renameTag = (button) => {
    const row = button.parentElement, tag = button.dataset.tag;
    const field = make("input", { type: "text", value: tag });
    field.setAttribute("aria-label", t("New name of the tag {tag}", { tag }));
    row.replaceChildren(make("label", { className: "entry grow" }, field));
    field.focus();
    field.select();
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") { event.preventDefault(); apply({ do: "rename tag", find: tag, put: field.value }); }
      else if (event.key === "Escape") tags();
    });
    field.addEventListener("blur", () => { if (field.isConnected && field.value === tag) tags(); });
  };

  // ---- concepts: edits of their table are written to dataset.toml ---------------------------------------
  let listed = null;  // the revision of the images that the table is of
  const concepts = easel.inOrder(async () => {
    if (!one("#concepts")?.open) return;
    listed = easel.shelf().revision;
    easel.fill(one("#concepts-found"), (await get("concepts")).html);
  });
  const changeConcepts = async (body) => {
    const answer = await easel.request("concepts", body);
    // The typed value differs from the file's.
    if (answer) await easel.load(); else one("#concepts-found").replaceChildren();
    await concepts();
    return answer;
  };
  const setConcepts = (body, words) => easel.inTurn(async () => {
    const answer = await changeConcepts(body);
    if (!answer || answer.before === answer.after) return;
    const restore = (text, now) => async () => Boolean(await changeConcepts({ do: "restore", text, now }));
    easel.did(words, restore(answer.before, answer.after), restore(answer.after, answer.before));
  });
  const move = async (folders) => {
    const answer = await easel.request("move", { folders });
    await easel.load();
    await concepts();
    return answer?.back;
  };
  const moveInto = (folder, names = easel.picked()) => easel.inTurn(async () => {
    if (!names.length) return easel.toast(t("Select images first"), "bad");
    await easel.waitingSaves();
    let back = await move(Object.fromEntries(names.map((name) => [name, folder])));
    if (!back || !Object.keys(back).length) return;
    // Each way answers with the way back.
    const again = async () => { const next = await move(back); if (next) back = next; return Boolean(next); };
    easel.did(t("{images} moved.", { images: plural(Object.keys(back).length, "image") }), again, again);
  });
  // Images are dragged onto a concept's row: those that are selected, or the one. A table out of view floats meanwhile.
  let dragged = null;
  const rowAt = ({ target }) => (dragged ? (target.closest ? target : target.parentElement)?.closest("#concepts-found tr:has([data-move-into])") : null);
  const markRow = (row) => { for (const each of all("#concepts-found tr")) each.classList.toggle("over", each === row); };
  const float = () => {
    const place = one("#concepts"), { top, bottom } = one("#concepts-found").getBoundingClientRect(), away = Boolean(dragged) && (top < 60 || bottom > innerHeight);
    place.style.minHeight = away ? `${place.offsetHeight}px` : "";
    place.classList.toggle("afloat", away);
  };
  document.addEventListener("dragstart", (event) => {
    const cell = event.target.closest?.(".thumb"), name = cell?.dataset.picture, picked = easel.picked();
    if (!cell) return;
    if (!one("#concepts").open || !one("#concepts-found [data-move-into]")) return event.preventDefault();
    dragged = picked.includes(name) ? picked : [name];
    event.dataTransfer.setData("application/x-lora-easel", name);
    event.dataTransfer.effectAllowed = "move";
    // A drag ends if the page changes while it begins. The cell of the chosen image stays, however far one scrolls.
    setTimeout(() => { easel.choose(name, { keep: picked.includes(name), focus: false }); float(); });
  });
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
    if (!dragged) return;
    const row = rowAt(event);
    if (row) event.preventDefault();
    markRow(row);
  });
  document.addEventListener("drop", (event) => {
    const row = rowAt(event);
    if (!row) return;
    event.preventDefault();
    moveInto(one("[data-move-into]", row).dataset.moveInto, dragged);
  });
  document.addEventListener("dragend", () => {
    if (!dragged) return;
    dragged = null;
    markRow(null);
    float();
  });
  document.addEventListener("change", ({ target }) => {
    const { concept, key, was } = target.dataset ?? {};
    if (concept === undefined) return;
    const value = target.type === "number" && target.value ? Number(target.value) : target.value.trim();
    setConcepts({ do: "set", number: Number(concept), was, key, value }, t("Concept changed."));
  });

  // ---- the check --------------------------------------------------------------------------------------------------
  const showCheck = (state) => {
    if (!one("#check-line")) return;
    easel.fillParts(state);
    easel.showLearned(state);
    if (state.state === "done") easel.setTwins(state.twins);
  };

  const watchCheck = easel.inOrder(async () => {
    let state = await get("check");
    // Measurements are cached, so checking a few images again takes no time.
    if (state.state === "done" && !state.fresh) state = await post("check", { by_itself: true });
    showCheck(state);
  });
  // The stream reports a running check; what is to be shown of it is requested.
  easel.on("check", ({ state }) => {
    if (!one("#check-line")) return false;
    if (state !== "idle") watchCheck();
  });
  // Shows the answer to a wish for a check, and what comes of it.
  easel.checked = (state) => { showCheck(state); if (state.state !== "idle") watchCheck(); };

  // ---- events ---------------------------------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if (target.id === "dataset-import") fromPath();
    else if (target.id === "path-toggle") {
      const open = one("#dataset-drop").toggleAttribute("data-path");
      target.setAttribute("aria-expanded", open);
      if (open) one("#dataset-path input").focus();
    }
    else if (target.id === "import-stop") { if (followed) post("import", { do: "cancel" }); else if (sending) sending.stopped = true; }
    else if (target.id === "bulk-apply") apply(scoped(edit()));
    else if (data.bulk) openBulk(data);
    else if (data.fix) apply(JSON.parse(data.fix));
    else if (target.id === "trigger-to-all") addTrigger();
    else if (target.id === "concepts-make") setConcepts({ do: "make" }, t("Concepts made of the folders."));
    else if (data.conceptRemove) setConcepts({ do: "set", number: Number(data.conceptRemove), was: data.was, key: "image_dir", value: "" }, t("Concept removed."));
    else if (data.moveInto !== undefined) moveInto(data.moveInto);
    else if (target.id === "bulk-undo") undoLast();
    else if (data.tagDo === "delete") apply({ do: "delete tag", find: data.tag });
    else if (data.tagDo === "rename") renameTag(target);
    else if (target.id === "check-start") post("check", { do: target.dataset.do }).then(easel.checked);
    else if (data.leave !== undefined) easel.leaveOut([data.leave]).then(watchCheck);
    else if (data.leaveAll) easel.leaveOut(JSON.parse(data.leaveAll)).then(watchCheck);
    else if (data.openPicture !== undefined) easel.open(data.openPicture);
  });
  document.addEventListener("change", (event) => {
    const input = event.target;
    if (input.id !== "dataset-upload" && input.id !== "folder-input") return;
    const files = [...input.files].map((file) => ({ file, path: file.webkitRelativePath.split("/").slice(1).join("/") || file.name }));
    input.value = "";
    take(files);
  });
  let typing = null;
  // Only a previewed change can be applied: a response still in flight is out of date.
  const soon = () => {
    lookup += 1;
    allow(false, t("What would change is being looked up"));
    clearTimeout(typing);
    typing = setTimeout(preview, 150);
  };
  document.addEventListener("input", (event) => {
    if (!event.target.closest?.("#bulk-form")) return;
    // Typed values are no longer replaced by the last request's.
    for (const state of Object.values(made)) state.asked ??= {};
    outcome("");
    soon();
  });
  document.addEventListener("submit", (event) => { if (event.target.id === "bulk-form" && !one("#bulk-apply").disabled) apply(scoped(edit())); });
  document.addEventListener("easel-shelf", () => { if (one("#bulk")?.open) soon(); if (easel.shelf().revision !== listed) concepts(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target.closest?.("#dataset-path")) fromPath(); });
  document.addEventListener("toggle", (event) => {
    if (!event.target.open) return;
    if (event.target.id === "bulk") { tags(); preview(); }
    if (event.target.id === "check") watchCheck();
    if (event.target.id === "concepts") concepts();
  }, true);
})();
