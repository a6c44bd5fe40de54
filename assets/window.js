// Shared client code: helpers, buttons, theme. Each tab has its own script.
//
// Events are delegated to the document, because the HTML is replaced during runs.
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  // Sends a body below /easel: the answer, or a `problem` in a sentence; `away` where none came.
  const parse = async (answer) => {
    const text = await answer.text(), reply = answer.headers.get("content-type")?.includes("json") ? JSON.parse(text) : { problem: text };
    return answer.ok || reply.problem ? reply : { problem: reply.error ?? text };
  };
  // What has the key `keep` is sent until it has arrived; its answer comes as `arrival` then.
  const send = async (path, body, options = {}) => {
    try { return await parse(await fetch(`/easel/${path}`, { method: "POST", body, ...options })); } catch ({ arrival }) {
      return { problem: t("The window does not answer; is it still open?"), away: true, arrival: arrival?.then((answer) => (answer ? parse(answer.clone()) : {})) };
    }
  };
  const post = (path, body, options) => send(path, JSON.stringify(body), { headers: { "Content-Type": "application/json" }, ...options });
  const upload = async (path, file) => {
    const reply = await send(`${path}?name=${encodeURIComponent(file.name)}`, file);
    return reply.away ? { problem: t("{name} did not arrive; try again.", { name: file.name }) } : reply;
  };
  const get = async (path) => (await fetch(`/easel/${path}`)).json();
  // An element with properties, `data-*` values and other attributes, and children.
  const make = (tag, options = {}, ...inside) => {
    const { data = {}, attributes = {}, ...rest } = options;
    const made = Object.assign(document.createElement(tag), rest);
    Object.assign(made.dataset, data);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...inside);
    return made;
  };
  // A text in the page's language, which the server has sent where it is not English; `values` fill its {placeholders}.
  const words = JSON.parse(one("#words")?.textContent ?? "{}");
  const t = (text, values = {}) => (words[text] ?? text).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
  const plural = (count, word) => t(count === 1 ? `{count} ${word}` : `{count} ${word}s`, { count: count.toLocaleString("en") });
  const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  // Makes calls of `look` run one after the other; one that waits is enough, as it is newer than all before it.
  const inOrder = (look) => {
    let running = null, again = false;
    return () => {
      again = true;
      running ??= (async () => {
        try { while (again) { again = false; await look(); } } finally { running = null; }
      })();
      return running;
    };
  };

  // Makes work run in turn: what comes while an answer is on its way waits for it, and nothing overtakes.
  const inTurns = () => {
    let last = Promise.resolve();
    return (work) => { last = last.catch(() => {}).then(() => work()); return last; };
  };

  // Keeps the keyboard focus while `draw` replaces the nodes in `place`: on the same control, or on its neighbour.
  const CONTROLS = "button, input, select, textarea, summary, a[href]";
  const nameOf = (node) => [node.tagName, node.id, node.getAttribute("aria-label"), ...Object.entries(node.dataset)].join();
  const refocus = (place, draw) => {
    const controls = () => all(CONTROLS, place);
    const focused = place.contains(document.activeElement) && document.activeElement;
    const at = controls().indexOf(focused), name = focused && nameOf(focused);
    draw();
    if (at < 0 || document.activeElement === focused) return;
    const now = controls(), same = now.filter((node) => nameOf(node) === name);
    (same.includes(now[at]) ? now[at] : same[0] ?? now[Math.min(at, now.length - 1)])?.focus({ preventScroll: true });
  };
  // A note for ten seconds; `undo` reverts its action.
  const toast = (text, tone = "", undo = null) => {
    const place = one("#easel-toast") ?? one(".gradio-container").appendChild(make("div", { id: "easel-toast", attributes: { role: "status" } }));
    const close = () => place.classList.remove("on");
    const buttons = [make("button", { type: "button", textContent: "×", onclick: close, attributes: { "aria-label": t("Dismiss") } })];
    if (undo) buttons.unshift(make("button", { type: "button", onclick: undo }, `${t("Undo")} `, make("kbd", { textContent: "Ctrl+Z" })));
    place.replaceChildren(make("span", { textContent: text }), ...buttons);
    place.dataset.tone = tone;
    toast.undo = undo;
    place.classList.add("on");
    clearTimeout(toast.timer);
    toast.timer = setTimeout(close, 10_000);
  };

  // Puts a value into a field of Gradio's, which listens for what a user types: through the prototype.
  const type = (field, value) => {
    Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), "value").set.call(field, value);
    for (const event of ["input", "change", "blur"]) field.dispatchEvent(new Event(event, { bubbles: true }));
    field.focus();
  };

  // Shows a problem, and answers null then.
  const unwrap = (reply) => {
    if (reply.problem) toast(reply.problem, "bad");
    return reply.problem ? null : reply;
  };
  const request = (...given) => post(...given).then(unwrap);
  // Forms are sent by scripts.
  document.addEventListener("submit", (event) => { if (event.target.method !== "dialog") event.preventDefault(); });

  // A dialog that is gone once it is closed, as by a click beside it.
  const dialog = (label, ...inside) => {
    const made = make("dialog", { className: "easel-dialog panel", attributes: { "aria-label": label } }, ...inside);
    (one(".gradio-container") ?? document.body).append(made);
    made.addEventListener("close", () => made.remove());
    made.addEventListener("click", (event) => { if (event.target === made) made.close(); });
    made.showModal();
    return made;
  };

  // API for the other scripts; `settling` functions run whenever the page may have changed.
  window.easel = { one, all, get, send, post, upload, make, t, plural, later, inOrder, inTurns, refocus, toast, unwrap, request, type, dialog, settling: [] };

  // Ctrl+Z outside fields does what the note offers. The Dataset tab knows more steps than the last.
  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.shiftKey || event.key.toLowerCase() !== "z" || event.target.closest?.("input, textarea, select")) return;
    if (!one("#dataset-grid")?.offsetParent && one("#easel-toast.on")) toast.undo?.();
  });

  // Browsers have a clipboard only at localhost and over https.
  const copy = async (button, text) => {
    try { await navigator.clipboard.writeText(text); button.textContent = t("Copied"); } catch { toast(t("The browser allows no copying at this address; select the text instead."), "bad"); }
  };

  // The doctor's findings, as the server renders them.
  const diagnose = async () => {
    const shown = dialog(t("Doctor"), make("p", { textContent: t("Checking this computer takes some seconds."), attributes: { role: "status" } }));
    const { html, problem } = await get("doctor").catch(() => ({ problem: t("The window does not answer.") }));
    if (html) shown.innerHTML = html;
    else shown.replaceChildren(make("p", { className: "problem", textContent: problem }));
  };

  // ---- one listener per event type -----------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a, [data-picture]");
    if (!target) return;
    const data = target.dataset;
    if (data.tab) openTab(data.tab);
    else if (target.id === "doctor") diagnose();
    else if (data.copy !== undefined) copy(target, data.copy);
    else if (data.themeSwitch !== undefined) {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("easel-theme", dark ? "dark" : "light");
    }
  });

  document.addEventListener("change", async ({ target }) => {
    if (target.id !== "language") return;
    if (await request("language", { language: target.value })) reload();
  });

  // ---- addresses: #train, #run/NAME, #dataset/IMAGE; Back works and a reload returns to the same place ---------
  const place = window.easel.place = () => {
    // An address is typed or linked from anywhere: one that is not encoded right is taken as it is.
    try { return location.hash.slice(1).split("/").map(decodeURIComponent); } catch { return location.hash.slice(1).split("/"); }
  };
  const shownRun = () => one("#run-status")?.dataset.shownRun ?? "";
  const inTurn = inTurns(), page = document.documentElement;
  let awaited = "", followed = null;
  // The address of what is shown, in place of the one before.
  const setAddress = window.easel.setAddress = (...parts) => { history.replaceState(null, "", `#${parts.map(encodeURIComponent).join("/")}`); followed = location.hash; };
  // Each tab has a scroll position of its own, `top` until the page is high enough for it; a button opens a tab at its top.
  const tops = {}, TOPS = "easel-tops";
  let top = null;
  history.scrollRestoration = "manual";
  try { Object.assign(tops, JSON.parse(sessionStorage.getItem(TOPS))); } catch { /* storage is off */ }
  addEventListener("pagehide", () => { try { sessionStorage.setItem(TOPS, JSON.stringify({ ...tops, [page.dataset.tab]: scrollY })); } catch { /* storage is off */ } });
  for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) addEventListener(kind, () => { top = null; }, { capture: true, passive: true });
  const showTab = () => {
    const [name] = place(), tabs = all("[role=tab]"), wanted = `#${name === "run" ? "train" : name}`;
    const tab = tabs.find((each) => each.hash === wanted) ?? tabs[0];
    for (const each of tabs) each.setAttribute("aria-selected", each === tab);
    for (const each of all(".tabitem")) Object.assign(each, { role: "tabpanel", ariaLabel: one(`[aria-controls=${each.id}]`)?.textContent });
    const before = page.dataset.tab, now = tab?.hash.slice(1);
    if (!tab || now === before) return;
    if (before) tops[before] = scrollY;
    page.dataset.tab = now;
    top = tops[now] ?? 0;
    keepTop();
  };
  const keepTop = () => {
    if (top === null || !page.dataset.ready) return;
    scrollTo(0, top);
    if (Math.abs(scrollY - top) < 2) top = null;
  };
  // `again` asks for a run that the page still shows, as where the stream has not reported its deletion yet.
  const follow = (again = false) => {
    followed = location.hash;
    const [name, run] = place();
    showTab();
    if (name !== "run" || !run || (run === shownRun() && !again)) return;
    awaited = run;
    inTurn(() => post("run", { do: "show", run })).then(() => setTimeout(() => { awaited = ""; }, 5000));
  };
  window.easel.openRun = (run) => { location.hash = `run/${encodeURIComponent(run)}`; follow(true); settleSoon(); };
  const openTab = window.easel.openTab = (name) => {
    if (page.dataset.tab === name.toLowerCase()) return;
    history.pushState(null, "", `#${name.toLowerCase()}`);
    delete tops[name.toLowerCase()];
    follow();
    // A button of the tab before is hidden now, which loses the keyboard focus.
    const panel = one(`#page-${name.toLowerCase()}`), left = document.activeElement.closest(".tabitem");
    if (left && left !== panel) Object.assign(panel, { tabIndex: -1 }).focus({ preventScroll: true });
    settleSoon();
  };
  addEventListener("hashchange", () => { if (location.hash !== followed) { follow(); settleSoon(); } });
  document.addEventListener("keydown", ({ key, target }) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (by && target.role === "tab") all("[role=tab]").at((all("[role=tab]").indexOf(target) + by) % all("[role=tab]").length).focus();
  });
  const keepAddress = () => {
    if (!page.dataset.ready) return showTab();
    // An address is followed before its event comes, as the current view would take its place.
    if (location.hash !== followed) return follow();
    const [name, run] = place(), shown = shownRun();
    if (awaited && awaited === shown) awaited = "";
    else if (name === "run" && !awaited && shown && run !== shown) setAddress("run", shown);
    followed = location.hash;
    keepTop();
  };

  // ---- a list opens on a key or a press, not on the focus that Tab or a script brings ----------------------------
  const LIST = "input[role=combobox], input[role=listbox]", closed = new WeakSet();
  let pressed = null;
  document.addEventListener("pointerdown", ({ target }) => { pressed = target; }, true);
  document.addEventListener("keydown", (event) => {
    pressed = null;
    if (!event.target.matches(LIST)) return;
    // Gradio opens its list on any key, on the Tab that leaves it too.
    if (["Tab", "Shift"].includes(event.key)) event.stopPropagation();
    else if (closed.delete(event.target)) event.target.dispatchEvent(new FocusEvent("focus"));
  }, true);
  document.addEventListener("focus", (event) => {
    if (!event.isTrusted || !event.target.matches?.(LIST) || event.target.closest(".block").contains(pressed)) return;
    closed.add(event.target);
    event.stopImmediatePropagation();
  }, true);

  // ---- Escape puts the tip of a field away, until another one has the pointer or the focus --------------------------
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") page.dataset.quiet = ""; }, true);
  document.addEventListener("focusin", () => { delete page.dataset.quiet; });
  document.addEventListener("pointerover", ({ target }) => { if (!target.closest(".tip")) delete page.dataset.quiet; });

  // ---- the live stream: HTML of parts of the page and the state of work under way, by name -----------------------
  const places = new Map(), latest = {}, tellers = {}, untold = new Set();
  const keyOf = (node) => node.id || node.dataset?.key || node.dataset?.run;
  // Makes `old` like `fresh` and keeps its nodes: those with an id or a key wherever they go, others by their place.
  const morph = (old, fresh) => {
    const keyed = new Map([...old.children].filter(keyOf).map((node) => [keyOf(node), node])), stay = new Set([...fresh.children].map(keyOf));
    for (const [key, node] of keyed) if (!stay.has(key)) node.remove();
    const chosen = (place) => (place.nodeName === "SELECT" ? one("option[selected]", place)?.value : undefined), before = chosen(old), kept = old.value;
    let at = old.firstChild;
    for (const wanted of [...fresh.childNodes]) {
      const key = keyOf(wanted), kept = key ? keyed.get(key) : at;
      if (kept?.nodeName !== wanted.nodeName || keyOf(kept) !== key) { old.insertBefore(wanted, at); continue; }
      keyed.delete(key);
      if (kept === at) at = at.nextSibling; else old.insertBefore(kept, at);
      if (wanted.nodeType !== 1) { if (kept.data !== wanted.data) kept.data = wanted.data; continue; }
      // Unfolded groups are the user's choice.
      for (const { name } of [...kept.attributes]) if (name !== "open" && !wanted.hasAttribute(name)) kept.removeAttribute(name);
      for (const { name, value } of [...wanted.attributes]) {
        if (name === "open" || kept.getAttribute(name) === value) continue;
        kept.setAttribute(name, value);
        if (name === "value" && kept !== document.activeElement) kept.value = value;
      }
      morph(kept, wanted);
    }
    while (at) { const next = at.nextSibling; at.remove(); at = next; }
    // Options that come and go leave a list on any of them.
    const now = chosen(old);
    if (old.nodeName === "SELECT") old.value = now === undefined || now === before ? kept : now;
    if (old.selectedIndex < 0) old.value = now ?? old.options[0]?.value;
  };
  // Makes the content of `place` like that HTML or those nodes, and keeps equal ones: a click that started on a node has to
  // end on it. A node that moves loses the keyboard focus.
  const fill = window.easel.fill = (place, ...content) => {
    const fresh = place.cloneNode(), held = document.activeElement;
    if (typeof content[0] === "string") [fresh.innerHTML] = content; else fresh.append(...content);
    morph(place, fresh);
    if (place.contains(held) && document.activeElement !== held) held.focus({ preventScroll: true });
  };
  // Parts of the page that an answer brings, by their ids.
  window.easel.fillParts = ({ parts = {} }) => { for (const [id, html] of Object.entries(parts)) if (one(`#${id}`)) fill(one(`#${id}`), html); };
  const draw = (name) => { if (places.has(name) && latest[name] !== undefined) fill(places.get(name), latest[name]); };
  // A function that answers false is called again once there is more of the page.
  const tell = (name) => { if (tellers[name]?.(latest[name]) === false) untold.add(name); else untold.delete(name); };
  window.easel.tell = tell;
  window.easel.on = (name, teller) => { tellers[name] = teller; if (latest[name] !== undefined) setTimeout(tell, 0, name); };
  // Gradio has made an element for a part; `hub` can trigger events of Gradio.
  let trigger = null;
  const theme = localStorage.getItem("easel-theme");
  window.easel.mount = () => {
    // Gradio has set the system's theme by now.
    if (theme && !places.size) document.body.classList.toggle("dark", theme === "dark");
    for (const made of (window.easelMounted ?? []).splice(0)) {
      if (made.name === "hub") trigger = made.trigger;
      else { places.set(made.name, made.element); draw(made.name); }
    }
  };

  // Gradio's own fields: those whose state changed are asked for once the form is filled.
  let filled = false, known = [];
  const updateFields = () => {
    const fields = (latest.fields ?? []).flatMap((mark, at) => (mark === known[at] ? [] : [at]));
    if (!filled || !trigger || !fields.length) return;
    known = latest.fields;
    trigger("change", { fields });
  };
  window.easel.on("fields", updateFields);
  window.easel.formShown = () => { filled = true; updateFields(); ready(); };
  window.easel.refill = () => trigger?.("submit");
  window.easel.on("version", (version) => { if (window.easel.version !== undefined && window.easel.version !== version) reload(); window.easel.version = version; });
  // The fields are drawn some frames after they were filled; a hidden page gets no frames.
  const frame = () => new Promise((drawn) => requestAnimationFrame(drawn));
  const ready = async () => {
    if (!filled || latest["run-bar"] === undefined || page.dataset.ready) return;
    await Promise.race([Promise.all([later(200), frame().then(frame)]), later(document.hidden ? 200 : 2000)]);
    page.dataset.ready = "1";
    for (const problem of refused.filter(Boolean)) toast(problem, "bad");
    settle();
  };

  const SILENT = 45_000, RETRY = 2000;
  let source = null, seen = "", silence = null;
  const listen = () => {
    source?.close();
    const mine = source = new EventSource(`/easel/live?seen=${seen}${document.hidden ? "&hidden=1" : ""}`);
    // A connection can die unnoticed while the computer sleeps.
    const heard = () => { clearTimeout(silence); silence = setTimeout(listen, SILENT); };
    heard();
    mine.onopen = () => away(false);
    mine.onmessage = ({ data, lastEventId }) => {
      heard();
      const parts = JSON.parse(data), first = latest["run-bar"] === undefined;
      // A server that was started again does not know what this page was looking at.
      if (seen && lastEventId && lastEventId.split("-")[0] !== seen.split("-")[0]) followed = null;
      if (lastEventId) seen = lastEventId;
      Object.assign(latest, parts);
      for (const name of Object.keys(parts)) { draw(name); tell(name); }
      if (first) ready();
      settle();
    };
    mine.onerror = async () => {
      // The server ends the stream of a hidden page, which is asked for again.
      if (document.hidden && mine.readyState === EventSource.CONNECTING) return;
      away(true);
      if (mine.readyState !== EventSource.CLOSED || mine !== source) return;
      // Refused: the password is asked for again after a restart.
      clearTimeout(silence);
      silence = setTimeout(listen, RETRY);
      const answer = await call("/easel/live?hidden=1").catch(() => null);
      if (answer?.status === 401) reload();
    };
  };
  document.addEventListener("visibilitychange", listen);
  addEventListener("online", listen);

  // ---- the server is away ------------------------------------------------------------------------------------
  const fetched = window.fetch.bind(window);
  // A reverse proxy answers for a server that is away.
  const call = async (...asked) => {
    const answer = await fetched(...asked);
    if ([502, 503, 504].includes(answer.status)) throw new TypeError("away");
    return answer;
  };
  const away = (is) => {
    document.documentElement.toggleAttribute("data-away", is);
    const note = one("#away");
    if (note) note.hidden = !is;
  };
  // What was typed and has not arrived, the newest by key. The browser's tab keeps it for the next load of the page, which
  // sends it before Gradio fills the form.
  const refused = [], unsent = new Map(), deliveries = new Map(), UNSENT = "easel-unsent", script = document.currentScript.src;
  const remember = () => { try { sessionStorage.setItem(UNSENT, JSON.stringify([script, ...unsent])); } catch { /* storage is off or full */ } };
  const forget = window.easel.forget = (key, request = unsent.get(key)) => {
    const newest = unsent.get(key) === request && unsent.delete(key);
    if (newest) remember();
    return newest;
  };
  const deliver = (key) => {
    const retry = async () => {
      for (; unsent.has(key); await later(RETRY)) {
        const request = unsent.get(key), answer = await call(...request).catch(() => null);
        if (!answer || answer.status === 401) continue;
        away(false);
        if (forget(key, request)) return answer;
      }
    };
    if (!deliveries.has(key)) deliveries.set(key, retry().finally(() => deliveries.delete(key)));
    return deliveries.get(key);
  };
  const restore = async () => {
    const [from, ...stored] = JSON.parse(sessionStorage.getItem(UNSENT) ?? "[]");
    for (const [key, request] of stored) if (from === script || !request[0].includes(EVENT)) unsent.set(key, request);
    const answers = [...unsent.keys()].map((key) => deliver(key).then((answer) => answer && parse(answer.clone())).then((reply) => refused.push(reply?.problem)));
    await Promise.race([later(5000), Promise.all(answers)]);
  };
  // A closed tab keeps nothing, and a slow server may have less than the fields hold. The page's own reload loses nothing.
  let reloading = false;
  const reload = window.easel.reload = () => { reloading = true; location.reload(); };
  // Another project has other runs and images.
  window.easel.reopen = () => { setAddress(page.dataset.tab); reload(); };
  addEventListener("beforeunload", (event) => { if (unsent.size && !reloading) event.preventDefault(); });
  addEventListener("pagehide", () => { for (const [address, request] of unsent.values()) call(address, { ...request, keepalive: true }).catch(() => {}); });
  const EVENT = "/gradio_api/run", restored = restore().catch(() => {});
  window.fetch = async (address, options = {}) => {
    const event = String(address).includes(EVENT) && window.gradio_config?.dependencies.find(({ id }) => id === JSON.parse(options.body).fn_index);
    if (event) await restored;
    // Names, settings and files belong to a project: a stale page, Gradio's fields included, must not change another one. The
    // demo's button opens its own.
    if (options.method === "POST" && window.easel.project !== undefined && !(event && window.easel.joining)) {
      options = { ...options, headers: new Headers(options.headers) };
      options.headers.set("X-Easel-Project", encodeURIComponent(window.easel.project));
    }
    // Typing, sliding and choosing: the last event counts.
    const key = event?.trigger_mode === "always_last" ? event.api_name : options.keep;
    const request = [String(address), { method: options.method, headers: Object.fromEntries(new Headers(options.headers)), body: options.body }];
    if (key) { forget(key); unsent.set(key, request); remember(); }
    try {
      if (deliveries.has(key)) throw new TypeError("away");
      const answer = await call(address, options);
      away(false);
      if (key && answer.status !== 401) forget(key, request);
      // Gradio draws what its events bring a moment later.
      if (event) settleSoon();
      if (event && key && event.inputs.length) window.easel.edited();
      return answer;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      away(true);
      const arrival = key && deliver(key);
      if (!event) throw Object.assign(error, { arrival });
      // What fills the page can only wait.
      if (!filled) return later(RETRY).then(() => window.fetch(address, options));
      // Gradio would load the page anew: it is answered that nothing has changed, and what has is asked for later.
      if (!key) {
        toast(t("The window does not answer; is it still open?"), "bad");
        // The demo's button has opened nothing: what is typed next is for this project.
        window.easel.joining = false;
      } else if (event.outputs.length > 1) arrival.then(() => { known = []; updateFields(); window.easel.refill(); });
      return Response.json({ data: event.outputs.map(() => ({ __type__: "update" })) });
    }
  };

  // ---- after the page changed: a message of the stream, a click, an event of Gradio ------------------------------
  const showBadges = () => {
    const badges = JSON.parse(one("[data-badges]")?.dataset.badges ?? "{}");
    for (const tab of all("[role=tab]")) {
      const badge = badges[tab.hash.slice(1)] ?? "";
      if ((tab.dataset.badge ?? "") !== badge) tab.dataset.badge = badge;
    }
  };
  // A named control that a response redrew keeps the keyboard focus.
  let focused = null;
  document.addEventListener("focusin", ({ target }) => { focused = target.matches(CONTROLS) && (target.id || target.dataset.body) ? target : null; });
  document.addEventListener("pointerdown", () => { focused = null; }, true);
  const keepFocus = () => {
    if (!focused || focused.isConnected || document.activeElement !== document.body) return;
    const name = nameOf(focused);
    focused = null;
    all(CONTROLS).find((node) => nameOf(node) === name)?.focus({ preventScroll: true });
  };
  const settle = () => {
    window.easel.mount();
    [...untold].forEach(tell);
    keepFocus();
    keepAddress();
    showBadges();
    const title = one("[data-page-title]")?.dataset.pageTitle;
    if (title && document.title !== title) document.title = title;
    // Gradio writes the browser's own language there.
    // Setting it to what it is has the browser compute all styles anew.
    const { lang } = one("#language [selected]") ?? page;
    if (page.lang !== lang) page.lang = lang;
    for (const follow of window.easel.settling) follow();
  };
  window.easel.settle = settle;
  const settleSoon = () => { for (const wait of [0, 50, 300]) setTimeout(settle, wait); };
  document.addEventListener("click", settleSoon);
  listen();
})();
