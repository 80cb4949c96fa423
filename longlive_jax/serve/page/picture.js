/** The picture a video begins with: read, and made smaller where it is larger than is of use. */

const MOST_BYTES = 1 << 20;
const MOST_SIDE = 2048;

/**
 * @param {File} file
 * @returns {Promise<{name: string, url: string}>} a data URL
 */
export async function readPicture(file) {
  const blob = file.size > MOST_BYTES ? await smaller(file) : file;
  return {name: file.name || "picture", url: await dataUrl(blob)};
}

async function smaller(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("the file is no picture that this browser reads");
  }
  const scale = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}
