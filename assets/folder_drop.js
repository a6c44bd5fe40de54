// Drag and drop anywhere on the window, including folders with sub-folders.
//
// A file input cannot take a dropped folder, so drops are intercepted, folders are walked, and each file is passed on
// with its path, so that `10_name` folders are kept.
(() => {
  const MOST_FILES = 100_000;  // one more is refused
  const holdsFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");

  const allEntries = (folder) => new Promise((resolve, reject) => {
    const reader = folder.createReader(), found = [];
    // One call returns at most 100 entries; an empty result is the end.
    const more = () => reader.readEntries((part) => {
      if (!part.length) return resolve(found);
      found.push(...part);
      more();
    }, reject);
    more();
  });

  const walk = async (entry, prefix, files) => {
    if (files.length > MOST_FILES || entry.name.startsWith(".")) return;
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      files.push({ file, path: prefix + file.name });
    } else if (entry.isDirectory) {
      for (const inside of await allEntries(entry)) await walk(inside, `${prefix}${entry.name}/`, files);
    }
  };

  const dropped = async (transfer) => {
    const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
    const files = [];
    // A single dropped folder is the dataset itself: its name is not part of the paths.
    for (const entry of entries) {
      const alone = entries.length === 1 && entry.isDirectory && !/^\d+_/.test(entry.name);
      if (alone) for (const inside of await allEntries(entry)) await walk(inside, "", files);
      else await walk(entry, "", files);
    }
    return files;
  };

  // LoRA files go to the Toolbox. On the Preview tab they are added as LoRAs, and images are read for
  // their settings.
  const previewDrop = () => { const place = document.querySelector("#preview-drop"); return place?.offsetParent ? place : null; };
  const hand = (files) => {
    const name = files.length === 1 ? files[0].path : "", adapter = /\.safetensors$/i.test(name);
    const preview = (adapter || /\.png$/i.test(name)) && previewDrop();
    if (adapter && !preview) return window.easel.openLora(files[0].file);
    if (!preview) return window.easel.takeFiles(files);
    const input = preview.querySelector("input[type=file]"), transfer = new DataTransfer();
    transfer.items.add(files[0].file);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };

  let depth = 0;
  const mark = (on, count = 0) => {
    document.documentElement.classList.toggle("dropping", on);
    document.body.dataset.drop = previewDrop() ? window.easel.t("Drop a LoRA to add it, an image to reuse its settings") : count > 1 ? window.easel.t("Drop {count} things to add to your images", { count: count.toLocaleString("en") }) : window.easel.t("Drop to add to your images");
  };
  addEventListener("dragenter", (event) => { if (holdsFiles(event)) { depth += 1; mark(true, event.dataTransfer.items.length); } }, true);
  addEventListener("dragleave", (event) => { if (holdsFiles(event)) { depth = Math.max(0, depth - 1); mark(depth > 0); } }, true);
  addEventListener("dragover", (event) => { if (holdsFiles(event)) { event.preventDefault(); event.stopPropagation(); } }, true);
  addEventListener("drop", async (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    depth = 0;
    mark(false);
    try { hand(await dropped(event.dataTransfer)); } catch { window.easel.toast(window.easel.t("What was dropped cannot be read; drop it again."), "bad"); }
  }, true);
})();
